"""Data in files of one's own: lists of records, folders of pictures, tables of captions."""
