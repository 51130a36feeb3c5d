"""What we did with the laboratory: the demo, the claims of the paper, the frontier below two passes, the implicit bias.

Each is a plan over `gradreg.lab`, its shipped choices, and a page.
"""
