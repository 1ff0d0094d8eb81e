"""Pictures become pixel values."""
