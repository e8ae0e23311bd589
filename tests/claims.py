"""
claims.py - what data/results/ holds, as README.md shows it; see tests/claims/tables.py.

    python tests/claims.py                         # every claim: its verdict, seeds, command
    python tests/claims.py --table                 # write the tables anew, say what changed
    python tests/claims.py --table lengths         # a claim's arms and paired differences, as text
    python tests/claims.py --figure grpo           # data/results/grpo_claims.png: all its claims
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from claims.tables import main
from data.run import cli

if __name__ == "__main__":
    cli(main)
