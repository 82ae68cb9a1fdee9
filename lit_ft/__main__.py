"""`python -m lit_ft`: train an adapter."""

from lit_ft.cli import main

if __name__ == "__main__":
    main()
