"""The pages, one file each: chat, compare, adapters, results. `serve.app` puts them side by side."""
