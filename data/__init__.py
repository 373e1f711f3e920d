"""The committed picture sets, their makers and the reader of a user's own pictures (`data.folder`)."""
