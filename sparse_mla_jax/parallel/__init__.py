"""One model on many devices: the axes of a mesh, what lies where, and what crosses devices."""
