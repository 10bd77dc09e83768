"""Key points of people: the record, readers of files, drawn skeletons."""
