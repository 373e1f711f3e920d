"""Training data: which images with which captions, one image, a folder of them, batches of them."""
