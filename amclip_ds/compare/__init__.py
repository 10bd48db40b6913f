"""`amclip compare`: recipes under equal data, order and budget; one table and one picture."""
