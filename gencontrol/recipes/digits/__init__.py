"""The bundled digit model: images, training, settings, measured quality."""
