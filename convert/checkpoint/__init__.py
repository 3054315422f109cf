"""A converted folder: written whole or not at all, checked, loaded, verified, exported."""
