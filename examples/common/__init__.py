"""What two examples need."""
