"""Private swarms: who is invited, who is a member, who is revoked, and what members tell each other."""

# Where programs look for an invitation, or for the name of a file that holds it.
ENVIRONMENT = "PETAL_JOIN"
