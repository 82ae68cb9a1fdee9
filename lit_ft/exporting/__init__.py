"""What `python -m lit_ft.export` makes of a trained adapter: plain LoRA, a merged model, a GGUF file, an upload."""
