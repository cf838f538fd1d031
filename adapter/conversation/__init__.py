"""One sandbox and one user: what is stored of them, the rules of sending, and the actor that carries these out."""
