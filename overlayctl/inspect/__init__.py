"""What people ask about images, layers and containers, as plain values."""
