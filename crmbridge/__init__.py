"""crmbridge: carries Instagram direct messages to a shop's own CRM and the replies back."""

__version__ = "0.1.0"
