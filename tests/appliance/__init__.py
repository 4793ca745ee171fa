"""The installed appliance: install.sh as root, the real OpenRC, kills, reboots and upgrades, in a Debian of its own."""
