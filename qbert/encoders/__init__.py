"""What an encoder is made of: its quantizable tensors and their roles, the parts of its layers, exchange of modules."""
