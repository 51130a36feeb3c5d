"""The claims of the paper as code: one file for each, the rules of their verdicts, and what is shown of them."""

from gradreg.studies.claims import cost, flooding, generalization, linear, sam
from gradreg.studies.claims.claim import Claim

CLAIMS: dict[str, Claim] = {
    claim.letter: claim for claim in (cost.CLAIM, generalization.CLAIM, linear.CLAIM, sam.CLAIM, flooding.CLAIM)
}

__all__ = ["CLAIMS", "Claim"]
