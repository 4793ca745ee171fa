"""What crmbridge costs and how fast it is, measured on the machine at hand beside what it stands on."""
