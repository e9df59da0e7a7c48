"""What one does with a student: search a folder of images, export it to ONNX, show it in a Space."""
