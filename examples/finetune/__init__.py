"""Fine-tune a real ResNet from pre-trained weights, on one device or many."""
