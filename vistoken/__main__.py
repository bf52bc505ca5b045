"""`python -m vistoken`: the command line."""

from __future__ import annotations

if __name__ == "__main__":
    from vistoken.commands.main import main

    main()
