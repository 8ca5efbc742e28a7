"""What each part of the composition does, on four workloads without a download."""
