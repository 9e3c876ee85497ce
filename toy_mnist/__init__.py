"""Color-MNIST, the small world in which every claim about ladd is measured."""
