"""From outputs and labels to decisions, numbers and comparisons."""
