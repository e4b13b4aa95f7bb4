"""How well a predicted label map matches the true one: counted, and measured along the boundaries."""
