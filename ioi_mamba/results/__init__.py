"""What a run leaves on disk, read again; and who may write there."""
