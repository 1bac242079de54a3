"""
The talk's claims about what an assistant knows and who it is.
"""
