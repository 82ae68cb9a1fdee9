"""Data: files and Hub sets → records → token ids with masks → packed windows."""
