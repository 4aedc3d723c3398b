"""The original algorithm written plainly from the papers: eager, pair by pair, tensor by tensor. The comparator."""
