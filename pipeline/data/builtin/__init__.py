"""Sources that need no download: drawn shapes and the emoji of a font."""
