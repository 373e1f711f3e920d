"""The committed picture sets and their makers. (A user's own pictures are read by train/data/.)"""
