"""The bundled text-to-image model and its judges: drawn scenes, training, settings, measured quality."""
