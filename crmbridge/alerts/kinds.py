"""The kinds of alerts: what each means, what to do, and how it ends. docs/operate.md's table is held to it."""

from dataclasses import dataclass

HOUR_S = 3600.0


@dataclass(frozen=True)
class Kind:
    """`cause` and `ends` in words for a person, `todo` is what to type unless the alert itself says more.

    ACCOUNT in it stands for the account's id. A `lasting` one is a state: its causes are not counted aloud. With
    `once`, the same message again is no new cause. One without another end is over `quiet_s` after its last cause.
    One with `wait_s` is told that much later, in case it belongs to a greater trouble.
    """

    cause: str
    todo: str
    ends: str
    lasting: bool = False
    once: bool = False
    quiet_s: float | None = None
    wait_s: float = 0.0


_STOPPED_WAIT_S = 120.0
_ASKS = (
    "the bridge asks Instagram by itself after 15 minutes (after a restriction: 24 h), then at twice the distance up "
    "to 6 h, and when it answers well one send tries"
)
_RENEW = "make a new token in Meta's console and set it: crmbridge account set ACCOUNT --token -"
_TAKES = "Instagram takes a send of the account again; or nothing waits for it any more"
KINDS = {
    "dead_letter": Kind(
        "events could not be delivered to the CRM and are dead letters",
        "crmbridge dlq list; mend the cause; crmbridge dlq retry --all --webhooks --account ACCOUNT",
        "no dead letter of the account is left",
    ),
    "in_doubt": Kind(
        "a send may or may not have reached the customer",
        "crmbridge dlq list --all --sends; look into the conversation in Instagram; if it is not there: "
        "crmbridge dlq retry --force ID",
        "no send in doubt is left",
    ),
    "crm_unauthorized": Kind(
        "the CRM answers 401: it does not accept our signature, and deliveries are held",
        "set the same webhook_secret in the CRM and by crmbridge account set ACCOUNT --secret -, or, when only the CRM "
        "was wrong, "
        "crmbridge account resume ACCOUNT --deliveries: either sends again what the 401 ended, too; a test is sent "
        "every five minutes for a week, but no more after two that were in vain, and when the CRM takes it and an "
        "event, all others go on by themselves",
        "the CRM takes an event again; or nothing waits for it any more",
    ),
    "crm_gone": Kind(
        "the CRM answered 410: it wants no more, and deliveries are held",
        "crmbridge account set ACCOUNT --url URL, or crmbridge account resume ACCOUNT --deliveries",
        "the deliveries are resumed",
    ),
    "crm_down": Kind(
        "the CRM has been failing for longer than [alerts] endpoint_down_after_s",
        "look at the CRM's server; what waits goes out by itself when that is well within [delivery] crm_give_up_s of "
        "its acceptance, and is a dead letter after that: crmbridge dlq retry",
        "the CRM takes an event; or nothing waits for it any more, whether it is well or not",
        lasting=True,
    ),
    "instagram_down": Kind(
        "Instagram has been failing for the account for longer than [alerts] endpoint_down_after_s",
        "look at https://metastatus.com and at this server's network; what waits goes out by itself when Instagram "
        "answers within [delivery] instagram_give_up_s of its acceptance, and fails after that",
        "Instagram answers; or nothing waits for it any more, whether it is well or not",
        lasting=True,
    ),
    "account_error": Kind(
        "Instagram refuses the account's sends, and they are held",
        "mend what the message names, in Instagram or in Meta's console; then crmbridge account set ACCOUNT "
        f"with --token - or --active; {_ASKS}",
        _TAKES,
        wait_s=_STOPPED_WAIT_S,
    ),
    "meta_trouble": Kind(
        "Instagram has stopped several accounts within minutes: this looks like trouble at Meta, not at the accounts",
        f"look at https://metastatus.com; {_ASKS}",
        "Instagram takes sends of all the accounts, or of all but one, which then has an alert of its own",
        lasting=True,
    ),
    "send_refused": Kind(
        "Instagram refused a send for a reason that an administrator can mend",
        "do what the message says; the CRM may then send it again",
        "there was none for an hour",
        quiet_s=HOUR_S,
    ),
    "sends_expired": Kind(
        "sends could not go out in time, as Instagram was not to be had; the CRM was told by message.failed",
        "crmbridge dlq list --all --sends; those whose window is still open: crmbridge dlq retry ID",
        "there was none for an hour",
        quiet_s=HOUR_S,
    ),
    "data_deletion": Kind(
        "Meta passed on the owner's request to delete an account's data, and the account was deleted",
        "delete what your CRM holds, too; connect the account again if that was not meant",
        "an hour has passed",
        quiet_s=HOUR_S,
    ),
    "token_dead": Kind(
        "the access token is no longer good",
        f"{_RENEW}; {_ASKS}",
        _TAKES,
        once=True,
        wait_s=_STOPPED_WAIT_S,
    ),
    "token_expiring": Kind(
        "the access token ends in 14, 7 or 1 days",
        _RENEW,
        "the token's end has moved",
        once=True,
    ),
    "token_not_renewed": Kind(
        "Instagram refused twice running to renew the access token: it is good until it ends, and nothing goes out "
        "after that",
        _RENEW,
        "a fresh token came, or a new one was set",
        once=True,
    ),
    "subscription_lost": Kind(
        "Instagram's webhooks for the account cannot be subscribed: nothing of its customers is told",
        "mend what the message names, or set a new token: crmbridge account set ACCOUNT --token -; it is tried again "
        "every six hours",
        "the account is subscribed again",
        once=True,
    ),
    "wrong_signatures": Kind(
        "20 webhooks in a row carried a wrong signature, or 5 over 5 minutes: as long as it is so Instagram's "
        "messages are refused, and Meta may end the subscription within the hour",
        "set [instagram] app_secrets to the Instagram app secret (Meta's console: API setup with Instagram login; "
        "not the Meta app secret of App settings > Basic), restart, and see with crmbridge check",
        "a webhook with a right signature comes",
    ),
    "silence": Kind(
        "nothing has come from Instagram for an account that usually talks",
        "write to the shop from another Instagram account; if it does not arrive, look at the webhook subscription "
        "and the app's state (Live) in Meta's console",
        "Instagram tells something about the account again",
        once=True,
    ),
    "held_long": Kind(
        "an account's deliveries or sends are held without an end, or for more than 7 days, and something has waited "
        "for more than a day",
        "crmbridge account list shows why; crmbridge account resume ACCOUNT, or, of an inactive account, crmbridge "
        "account set ACCOUNT --active",
        "they are resumed, or nothing waits any more",
        lasting=True,
    ),
    "disk_nearly_full": Kind(
        "the database's disk has less free than [alerts] disk_free_mb",
        "free space: df -h shows where",
        "a quarter more than that is free",
        lasting=True,
    ),
    "disk_full": Kind(
        "the disk is full: nothing new is taken, what was taken is still delivered",
        "free space: df -h shows where; work goes on without a restart",
        "there is space again",
        lasting=True,
    ),
    "database_large": Kind(
        "the database is larger than [retention] max_mb, though nothing more of it may go",
        "raise max_mb; crmbridge check shows what is owed; while the service is stopped, sqlite3 bridge.db VACUUM "
        "closes the gaps that short texts left",
        "it is smaller than that",
        lasting=True,
    ),
    "backup_old": Kind(
        "the last backup failed, or none was made within two days: what came since is lost when the disk dies",
        "crmbridge backup /var/lib/crmbridge/backups/ --keep 14 tells what is wrong; daily by cron: docs/operate.md, "
        "Backups",
        "a good backup was made",
        lasting=True,
    ),
    "request_fault": Kind(
        "the bridge itself failed at a request",
        "look for request.fault in the log, and report it",
        "there was none for an hour",
        quiet_s=HOUR_S,
    ),
    "system_fault": Kind(
        "the bridge itself failed at something",
        "look for 'error' in the log around that time, and report it",
        "there was none for an hour",
        quiet_s=HOUR_S,
    ),
}
OTHER = Kind("something needs a look", "look into the log", "it is over")


def table() -> list[str]:
    """Return the lines of a table in Markdown: each kind, its cause, what to do and what ends it."""
    lines = ["| kind | what it means | what to do | it is over when |", "| --- | --- | --- | --- |"]
    return lines + [f"| `{name}` | {kind.cause} | {kind.todo} | {kind.ends} |" for name, kind in KINDS.items()]


def kind_of(name: str) -> Kind:
    """Return what is known about a kind."""
    return KINDS.get(name, OTHER)
