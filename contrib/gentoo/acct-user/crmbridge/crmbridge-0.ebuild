# Never run on Gentoo: see README.md.
EAPI=8

inherit acct-user

DESCRIPTION="The user that crmbridge runs as"
ACCT_USER_ID=-1
ACCT_USER_GROUPS=( crmbridge )
ACCT_USER_HOME=/var/lib/crmbridge
ACCT_USER_HOME_PERMS=0750

acct-user_add_deps
