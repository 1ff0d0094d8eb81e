"""From YAML to checked settings; no PyTorch."""
