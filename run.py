#!/usr/bin/env python3
"""Start the router from a checkout: `python run.py [serve] [options]`."""

from router.__main__ import main

if __name__ == "__main__":
    main()
