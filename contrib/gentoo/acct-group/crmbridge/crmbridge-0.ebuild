# Never run on Gentoo: see README.md.
EAPI=8

inherit acct-group

ACCT_GROUP_ID=-1
