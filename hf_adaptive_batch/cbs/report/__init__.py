"""What measured steps say: fits and laws as a page, in the terminal, and as advice."""
