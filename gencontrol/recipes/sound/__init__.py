"""The bundled sound models: synthesised clips, training, settings, measured quality."""
