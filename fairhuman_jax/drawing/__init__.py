"""Drawing: options, requests, and jobs that become pictures on disk."""
