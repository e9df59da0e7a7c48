"""Programs that make datasets: image-text rows and the columns a teacher adds to them."""
