"""Streaming from tar, parquet and datasets shards."""
