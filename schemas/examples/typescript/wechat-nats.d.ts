/* Messages of the bus, generated from the JSON Schemas here by `make generate`; do not edit.
   Of: e761191981914efaedba35dd323b378f77461c869b5f86f7b26fa218f876aa57 */

/**
 * Options of a binding.
 */
export interface Options {
  /**
   * Show the typing indicator from each inbound message to the answer.
   */
  auto_typing?: boolean;
  /**
   * Download the user's media; false: messages only mention them.
   */
  media?: boolean;
}
/**
 * Bind a bot to a sandbox. Subject: wechat.bind.<sandbox>.
 */
export interface Bind {
  /**
   * If it is there, it is the subject's.
   */
  sandbox?: string | null;
  /**
   * iLink's bot id, …@im.bot.
   */
  bot: string;
  /**
   * Secret of the bot.
   */
  bot_token: string;
  /**
   * Names it in its receipt. Default: the header Nats-Msg-Id, else its sequence.
   */
  id?: string | null;
  /**
   * iLink API base of this bot. Default: the service's.
   */
  base_url?: string | null;
  user?: string | null;
  /**
   * Cursor to poll from; an empty one is none. Default: the current one, or the start. A secret: iLink's cursors contain the bot's token.
   */
  cursor?: string | null;
  options?: Options;
  /**
   * Whether ids have to end as those of iLink do; false: they are taken as they are. iLink is not asked about the token: the events `stale` and `needs_login` follow the first poll.
   */
  check?: boolean;
}
/**
 * A binding changed. Subject: wechat.event.<sandbox>.binding.
 */
export interface BindingEvent {
  sandbox: string;
  bot: string;
  /**
   * replaced: another bot of the same user took its place. stale: iLink answered -14, and the token is retried for a short time. needs_login: the retries failed; scan a new QR code. recovered: iLink accepts the token again, also after needs_login.
   */
  change: "bound" | "needs_login" | "recovered" | "replaced" | "stale" | "unbound";
  user?: string;
  /**
   * stale and needs_login: iLink's error text, if any.
   */
  reason?: string;
  /**
   * One sentence that says what to do.
   */
  detail?: string;
  /**
   * Id of the bind or unbind that caused it.
   */
  request?: string;
  at_ms?: number;
}
/**
 * How a bot fares now. Times are Unix milliseconds, 0: never, or not known.
 */
export interface BindingHealth {
  /**
   * not_polled: no replica polls it. too_new: a newer version wrote the binding, or what is stored of its person, and no replica that knows it polls the bot. failing: for a minute iLink has answered no poll, or the answer cannot be stored. unknown: a replica gave no answer. stale: iLink refuses its token, which is tried again. paused: NATS or the lease is away. retrying: the last poll failed. waiting: another replica may still poll it. storing: an answer of iLink is being stored.
   */
  status:
    | "failing"
    | "needs_login"
    | "not_polled"
    | "paused"
    | "polling"
    | "retrying"
    | "stale"
    | "storing"
    | "too_new"
    | "unknown"
    | "waiting";
  /**
   * Why, in a few words.
   */
  detail?: string;
  /**
   * Since when, as its replica says.
   */
  since_ms?: number;
  /**
   * Which polls it.
   */
  replica?: string;
  /**
   * When iLink last answered a poll.
   */
  answered_ms?: number;
  /**
   * When its user wrote last.
   */
  inbound_ms?: number;
  /**
   * When something was last sent in the user's window.
   */
  sent_ms?: number;
  /**
   * What may be sent now; null where it was never open.
   */
  window?: Window | null;
  /**
   * What is kept of its user was written by a newer version, and is not read.
   */
  is_unread?: boolean;
}
/**
 * What may still be sent to the user before they write again.
 */
export interface Window {
  /**
   * Sends left; 0 also if the window is over or WeChat accepts no more; null: sends are not counted. Each part of a long text, each media item and each caption is a send.
   */
  remaining?: number | null;
  /**
   * When the window closes; null: it is not open.
   */
  closes_at_ms?: number | null;
}
/**
 * A binding without its token: answer of wechat.svc.bindings.get and .list.
 */
export interface BindingInfo {
  sandbox: string;
  bot: string;
  user?: string;
  base_url?: string;
  state?: "active" | "needs_login" | "too_new";
  /**
   * Why it needs a login; empty otherwise.
   */
  reason?: string;
  /**
   * Start of this state.
   */
  since_ms?: number;
  options?: Options;
  /**
   * Only where the request asks for it.
   */
  health?: BindingHealth | null;
}
/**
 * Answer of wechat.svc.bindings.list and .get, in the order of bot ids.
 */
export interface BindingsPage {
  bindings: BindingInfo[];
  /**
   * Value of `after` for the next page; empty: this is the last.
   */
  next?: string;
}
/**
 * Request of wechat.svc.bindings.list (all filters optional) and .get (by `bot`, or by `sandbox`).
 */
export interface BindingsQuery {
  sandbox?: string | null;
  bot?: string | null;
  /**
   * Continue after this bot: `next` of the previous page.
   */
  after?: string;
  /**
   * Page size.
   */
  limit?: number;
  /**
   * Say how each bot fares; all replicas are asked. Only of .list.
   */
  health?: boolean;
}
/**
 * Answer of wechat.svc.send.<sandbox>: the command is stored, as after the acknowledgement of a publish.
 */
export interface CommandStored {
  /**
   * Its id, as `command` in its receipts: the body's, else a new one.
   */
  command: string;
  /**
   * Its sequence in WECHAT_OUT, as in its receipts.
   */
  sequence: number;
}
/**
 * Unbind a person, and erase everything of theirs. Subject: wechat.erase.<sandbox>, or wechat.erase._ for all
 * sandboxes. It may be repeated.
 */
export interface Erase {
  /**
   * The WeChat user, …@im.wechat.
   */
  user: string;
  /**
   * If it is there, it is the subject's.
   */
  sandbox?: string | null;
  /**
   * Names it in its receipt. Default: the header Nats-Msg-Id, else its sequence.
   */
  id?: string | null;
  /**
   * Only count what there is, and leave the person bound.
   */
  dry_run?: boolean;
}
/**
 * A file.
 */
export interface FileItem {
  kind: "file";
  /**
   * File name from the sender.
   */
  name?: string;
  media?: Media | null;
  /**
   * Why there are no `media`: off (the binding's option), reference (iLink did not say where they are), corrupt (nor how to decrypt them). Empty: `media` names them.
   */
  reason?: string;
}
/**
 * An object in the store `wechat_media`. A sandbox reads its objects by wechat.svc.media.get.<sandbox>.
 *
 * In an inbound message the object is named before its bytes are fetched, with what iLink tells of it. The answer of
 * media.get has the rest.
 */
export interface Media {
  /**
   * Its name: <sandbox>/…
   */
  object: string;
  /**
   * File name from the sender; of an upload without one, generated. Empty: iLink told none.
   */
  name?: string;
  /**
   * Type, detected from the content; empty before it is fetched.
   */
  mime?: string;
  /**
   * Bytes. In an inbound message as iLink tells them, of a video up to 16 more than it has; 0: not told.
   */
  size?: number;
  /**
   * Lower-case hex.
   */
  sha256?: string;
  /**
   * Pixels, if known.
   */
  width?: number | null;
  /**
   * Pixels, if known.
   */
  height?: number | null;
  /**
   * If known.
   */
  duration_ms?: number | null;
}
/**
 * A picture.
 */
export interface ImageItem {
  kind: "image";
  media?: Media | null;
  /**
   * Why there are no `media`: off (the binding's option), reference (iLink did not say where they are), corrupt (nor how to decrypt them). Empty: `media` names them.
   */
  reason?: string;
}
/**
 * The quoted message.
 */
export interface Quote {
  /**
   * iLink's id of the quoted message; empty if it gave none.
   */
  id?: string;
  /**
   * The quoted text or a summary, if known.
   */
  text?: string;
  /**
   * bot: the bot sent it lately; empty: unknown.
   */
  said_by?: "" | "bot";
  /**
   * Quoted kind: text, image, voice, file, video; empty: unknown.
   */
  kind?: string;
}
/**
 * Text, as the user wrote it.
 */
export interface TextItem {
  kind: "text";
  text: string;
}
/**
 * Something that the adapter cannot translate (yet).
 */
export interface UnsupportedItem {
  kind: "unsupported";
  /**
   * iLink's item type; 0: unknown.
   */
  type: number;
  /**
   * The cause: kind, malformed or too_large.
   */
  reason?: string;
}
/**
 * A video.
 */
export interface VideoItem {
  kind: "video";
  duration_ms?: number | null;
  media?: Media | null;
  /**
   * Why there are no `media`: off (the binding's option), reference (iLink did not say where they are), corrupt (nor how to decrypt them). Empty: `media` names them.
   */
  reason?: string;
}
/**
 * A voice message.
 */
export interface VoiceItem {
  kind: "voice";
  /**
   * WeChat's speech-to-text; may be wrong, may be empty.
   */
  transcript?: string;
  duration_ms?: number | null;
  /**
   * As recorded, usually SILK.
   */
  media?: Media | null;
  /**
   * The recording as WAV, where the adapter converts it. If it cannot, media.get answers 404.
   */
  wav?: Media | null;
  /**
   * Why there are no `media`: off (the binding's option), reference (iLink did not say where they are), corrupt (nor how to decrypt them). Empty: `media` names them.
   */
  reason?: string;
}
/**
 * A user's message to the bot of one sandbox. Subject: wechat.in.<sandbox>.
 */
export interface Inbound {
  /**
   * Unique.
   */
  id: string;
  /**
   * Name of a sandbox.
   */
  sandbox: string;
  bot: string;
  user: string;
  /**
   * Unix milliseconds, WeChat's clock; 0 if it gave none.
   */
  sent_at_ms: number;
  /**
   * Unix milliseconds, the adapter's clock.
   */
  received_at_ms: number;
  /**
   * All text and transcripts, one per line; "" if none.
   */
  text: string;
  items: (TextItem | ImageItem | VoiceItem | FileItem | VideoItem | UnsupportedItem)[];
  quote?: Quote | null;
  window?: Window;
}
/**
 * Answer of wechat.svc.login.*: a QR login with its code, which is a secret until the login is over.
 */
export interface Login {
  /**
   * Id for login.status, .verify and .cancel.
   */
  login: string;
  sandbox: string;
  status:
    | "already_bound"
    | "cancelled"
    | "confirmed"
    | "expired"
    | "failed"
    | "lost"
    | "need_verify_code"
    | "scanned"
    | "wait";
  /**
   * Number of the QR code, from 1.
   */
  code?: number;
  /**
   * The text to encode as a QR code; empty at the end.
   */
  qrcode_url?: string;
  /**
   * The code drawn for a terminal, dark on light by ANSI colours.
   */
  qrcode_text?: string;
  /**
   * The code as base64 PNG, if requested.
   */
  qrcode_png?: string;
  /**
   * When the whole login ends.
   */
  expires_at_ms?: number;
  bot?: string;
  user?: string;
  /**
   * confirmed: the person bound to the sandbox already, if it is not the one who scanned.
   */
  former_user?: string;
  /**
   * need_verify_code: wrong_code; in an answer also checking, while digits are being checked. expired: time, or codes (too many expired). failed: blocked (too many wrong digits), bus, url, crashed, stale_token, or why the bind was refused.
   */
  reason?: string;
  /**
   * One sentence that says what to do.
   */
  detail?: string;
}
/**
 * A step of a QR login. Subject: wechat.event.<sandbox>.login. It never contains the code, which is a secret.
 */
export interface LoginEvent {
  login: string;
  sandbox: string;
  /**
   * wait: a code, or a new one, is to be scanned, see `code`. scanned: to be confirmed on the phone. need_verify_code: send the digits shown on the phone by login.verify. confirmed: the bot is bound. already_bound: a bot of the sandbox already serves this user. expired, failed, cancelled: the login is over. lost: the replica that ran it is gone; start another login.
   */
  status:
    | "already_bound"
    | "cancelled"
    | "confirmed"
    | "expired"
    | "failed"
    | "lost"
    | "need_verify_code"
    | "scanned"
    | "wait";
  /**
   * Number of the QR code, from 1; request a new one by login.status.
   */
  code?: number;
  bot?: string;
  user?: string;
  /**
   * confirmed: the person bound to the sandbox already, if it is not the one who scanned.
   */
  former_user?: string;
  /**
   * need_verify_code: wrong_code; in an answer also checking, while digits are being checked. expired: time, or codes (too many expired). failed: blocked (too many wrong digits), bus, url, crashed, stale_token, or why the bind was refused.
   */
  reason?: string;
  /**
   * One sentence that says what to do.
   */
  detail?: string;
  at_ms?: number;
}
/**
 * Request of wechat.svc.login.status and .cancel.
 */
export interface LoginQuery {
  login: string;
  /**
   * Also return the code as PNG.
   */
  png?: boolean;
}
/**
 * Request of wechat.svc.login.start: a QR code that binds the user who scans it to `sandbox`.
 */
export interface LoginStart {
  /**
   * Name of a sandbox.
   */
  sandbox: string;
  options?: Options;
  /**
   * Also return the code as PNG.
   */
  png?: boolean;
}
/**
 * Request of wechat.svc.login.verify.
 */
export interface LoginVerify {
  login: string;
  /**
   * The digits shown on the phone.
   */
  code: string;
}
/**
 * Headers of the answer of wechat.svc.media.get.<sandbox>, whose payload is the piece. The first piece has those
 * that describe the content, as far as it shows them.
 */
export interface MediaBytes {
  /**
   * Bytes of the whole object.
   */
  "Wechat-Size": number;
  /**
   * Hash of the whole object, lower-case hex.
   */
  "Wechat-Sha256": string;
  /**
   * `after` for the next piece; absent: this is the last.
   */
  "Wechat-Next"?: number | null;
  /**
   * File name, percent-encoded; from the sender, or for the type.
   */
  "Wechat-Name"?: string;
  /**
   * Type, detected from the content.
   */
  "Wechat-Mime"?: string;
  /**
   * Pixels of a picture.
   */
  "Wechat-Width"?: number | null;
  /**
   * Pixels of a picture.
   */
  "Wechat-Height"?: number | null;
  /**
   * Length of a recording.
   */
  "Wechat-Duration-Ms"?: number | null;
}
/**
 * Headers of wechat.svc.media.put.<sandbox>, whose payload is a piece of 16 KiB (the last may be shorter) to 512
 * KiB. The answer is a Media, complete after the last piece. A piece may be repeated.
 */
export interface MediaPiece {
  /**
   * Your unique id of the upload.
   */
  "Wechat-Upload": string;
  /**
   * Bytes before this piece; the first has 0.
   */
  "Wechat-Offset"?: number;
  /**
   * This is the last piece.
   */
  "Wechat-Last"?: boolean;
  /**
   * File name, percent-encoded; on the last piece.
   */
  "Wechat-Name"?: string;
  /**
   * Hash of the whole, on the last piece; checked if given.
   */
  "Wechat-Sha256"?: string;
}
/**
 * Request of wechat.svc.media.get.<sandbox>: the next piece of an object, which is the answer's payload.
 */
export interface MediaQuery {
  /**
   * `media.object` of an item.
   */
  object: string;
  /**
   * 0, then the header Wechat-Next of the previous answer.
   */
  after?: number;
  /**
   * Place of the inbound message with the item, so that its media can be fetched if the store does not have them (yet); empty: only what is stored is given.
   */
  position?: string;
  /**
   * Longest wait for media that are being fetched, then the answer is 503: ask again. 0: only what is stored is given.
   */
  wait_s?: number;
}
/**
 * One message of wechat.svc.next.<sandbox>.
 */
export interface Handed {
  /**
   * Its place in the inbox, opaque: as the header Wechat-Position of the live message.
   */
  position: string;
  /**
   * The inbound message, unchanged.
   */
  message: {
    [k: string]: unknown;
  };
}
/**
 * Answer of wechat.svc.next.<sandbox>, at once and oldest first: the messages that are not confirmed, again until
 * they are.
 */
export interface NextPage {
  /**
   * Names this reader in its next requests.
   */
  reader: number;
  messages: Handed[];
  /**
   * The position of the message before which others are gone unread; empty: none are.
   */
  first?: string;
}
/**
 * Request of wechat.svc.next.<sandbox>: the inbound messages that the sandbox has not handled yet.
 *
 * Without `reader` it makes the asker the sandbox's reader; the former one gets an error (409) from then on.
 */
export interface NextQuery {
  reader?: number | null;
  after?: string | null;
  /**
   * Most messages of the answer.
   */
  max?: number;
}
/**
 * A file to send.
 */
export interface OutFile {
  kind: "file";
  /**
   * An object of this sandbox; only `object` and `name` are used.
   */
  media?: Media | null;
  /**
   * The bytes of a small item, instead of `media`.
   */
  data?: string | null;
  /**
   * File name that the user sees.
   */
  name?: string;
  /**
   * Text sent before the item as a message of its own.
   */
  caption?: string;
}
/**
 * A picture to send.
 */
export interface OutImage {
  kind: "image";
  /**
   * An object of this sandbox; only `object` and `name` are used.
   */
  media?: Media | null;
  /**
   * The bytes of a small item, instead of `media`.
   */
  data?: string | null;
  /**
   * File name that the user sees.
   */
  name?: string;
  /**
   * Text sent before the item as a message of its own.
   */
  caption?: string;
}
/**
 * Text to send.
 */
export interface OutText {
  kind: "text";
  text: string;
}
/**
 * A video to send.
 */
export interface OutVideo {
  kind: "video";
  /**
   * An object of this sandbox; only `object` and `name` are used.
   */
  media?: Media | null;
  /**
   * The bytes of a small item, instead of `media`.
   */
  data?: string | null;
  /**
   * File name that the user sees.
   */
  name?: string;
  /**
   * Text sent before the item as a message of its own.
   */
  caption?: string;
}
/**
 * Audio to send. It arrives as a file, because WeChat shows no voice messages of bots.
 */
export interface OutVoice {
  kind: "voice";
  /**
   * An object of this sandbox; only `object` and `name` are used.
   */
  media?: Media | null;
  /**
   * The bytes of a small item, instead of `media`.
   */
  data?: string | null;
  /**
   * File name that the user sees.
   */
  name?: string;
  /**
   * Text sent before the item as a message of its own.
   */
  caption?: string;
}
/**
 * A command to send a message. Subject: wechat.out.<sandbox>, or wechat.out with `sandbox`. Least:
 * {"text":"hi"}.
 */
export interface Outbound {
  /**
   * Idempotency key: a command with the `id` of one of its user's last 32 that ended, and not as refused, is not sent; its receipt has `repeat_of`. Default: the header Nats-Msg-Id, else the stream sequence, which only name the command.
   */
  id?: string | null;
  /**
   * Required on plain wechat.out; elsewhere it must equal the sandbox in the subject.
   */
  sandbox?: string | null;
  /**
   * Required only if the sandbox has several bots.
   */
  bot?: string | null;
  /**
   * Default: the bot's user. An answer names the `user` of the message that it answers, because another person may be bound by then.
   */
  user?: string | null;
  /**
   * Short form of one text item.
   */
  text?: string | null;
  items?: (OutText | OutImage | OutVideo | OutFile | OutVoice)[] | null;
  /**
   * Id of the inbound message that this answers. The command is refused (other_user) if that message is from another person than the command goes to.
   */
  reply_to?: string | null;
  /**
   * If nothing may be sent now: wait for the user's next message, or refuse at once.
   */
  when_closed?: "park" | "refuse";
  expires_in_s?: number | null;
  /**
   * Not before this time (Unix milliseconds), at most WECHAT_NATS_PARK_HOURS less an hour ahead. Until then it is parked as `scheduled`, and nothing waits behind it.
   */
  send_at_ms?: number | null;
  /**
   * Instead of text and items: show or hide the typing indicator.
   */
  typing?: ("off" | "on") | null;
  /**
   * Instead of text and items: take back the sandbox's earlier command with this id. If it still waits it ends as refused (cancelled) and this one as applied, else this one as refused (not_found).
   */
  cancel?: string | null;
}
/**
 * The result of a command, bind, unbind or erase. Each gets exactly one final receipt; `parked` is not final.
 *
 * Subject: wechat.event.<sandbox>.receipt.<command>.<sequence>; of a bind, unbind or erase that word stands for
 * `receipt`, and the header Reply-To gets it, too, if it names an inbox. `<command>` is the command's id: letters,
 * digits, `-` and `_` stay, each other byte becomes =XX (upper-case hex). If that has more than 64 characters, it is
 * `==` and the first 32 hex digits of the id's SHA-256. `<sequence>` is the field `sequence`.
 */
export interface Receipt {
  /**
   * The command's id.
   */
  command: string;
  /**
   * `_` if the command has none that can be read.
   */
  sandbox: string;
  /**
   * The command's sequence in WECHAT_OUT, as in its publish ack; an id may be used again.
   */
  sequence?: number;
  /**
   * As the command named it; empty where it is not known.
   */
  reply_to?: string;
  /**
   * Sequence of the earlier command with the same `id`, whose outcome this is: this one is not sent. 0: it is no repeat.
   */
  repeat_of?: number;
  /**
   * accepted: iLink answered with a message id. accepted_unconfirmed: success without an id; WeChat often drops it, and it is never resent. applied: the bind, unbind, erase or cancel is done. refused: will not be sent, or was not applied. uncertain: sent without an answer, also to one repeat with the same client_id. dead_lettered: unreadable, or the adapter failed on it; see WECHAT_DEAD. parked (not final): waits for the user, the login or its time.
   */
  outcome: "accepted" | "accepted_unconfirmed" | "applied" | "dead_lettered" | "parked" | "refused" | "uncertain";
  /**
   * invalid, not_bound, ambiguous_bot, other_user, window_closed, quota, throttled, needs_login, scheduled, cancelled, too_long, expired, rejected, unreadable, too_large, crashed, media, of a bind bound_elsewhere, url, token_key, too_new, of a cancel not_found. Empty if accepted or applied.
   */
  reason?: string;
  /**
   * One sentence for people.
   */
  detail?: string;
  bot?: string;
  user?: string;
  /**
   * iLink's ids, one per message sent.
   */
  message_ids?: string[];
  /**
   * From iLink's answer.
   */
  ret?: number | null;
  /**
   * From iLink's answer.
   */
  errcode?: number | null;
  /**
   * From iLink's answer.
   */
  errmsg?: string;
  /**
   * Of the last answer of iLink, its CDN or a gateway that refused the command or held it up. 0: there was none, or it is accepted.
   */
  http_status?: number;
  window?: Window;
  /**
   * Requests to sendmessage for this command.
   */
  attempts?: number;
  /**
   * When the command was stored, on `wechat.out` or its sandbox's subject.
   */
  received_at_ms?: number;
  /**
   * When this receipt was created.
   */
  at_ms?: number;
  /**
   * Bots that serve nobody any more: replaced by the bind, or unbound. An erase names none.
   */
  bots?: string[];
  /**
   * erase: how many messages were found of each kind, and erased.
   */
  counts?: {
    [k: string]: number;
  };
  /**
   * erase: how many are there all the same, so erase again; empty: none are.
   */
  left?: {
    [k: string]: number;
  };
  /**
   * erase: bots of the sandbox, or of all, whose users are not known yet. Nothing is found by them: unbind the one whose user this is.
   */
  unlearned?: number;
}
/**
 * Request of wechat.svc.receipt.<sandbox>, and for the platform of wechat.svc.receipt: a command's last
 * receipt.
 */
export interface ReceiptQuery {
  /**
   * Required if the subject has none. It must not differ from the subject's.
   */
  sandbox?: string | null;
  /**
   * Idempotency key of a command.
   */
  command: string;
  /**
   * The command's sequence in WECHAT_OUT. Default: the newest receipt of this id.
   */
  sequence?: number | null;
}
/**
 * One message of a replay.
 */
export interface Replayed {
  /**
   * Its place in the inbox, opaque: as the header Wechat-Position of the live message.
   */
  position: string;
  /**
   * The inbound message, unchanged.
   */
  message: {
    [k: string]: unknown;
  };
}
/**
 * Answer of wechat.svc.replay.<sandbox>, oldest first.
 */
export interface ReplayPage {
  messages: Replayed[];
  /**
   * Value of `after` for the next page; empty: this is the last.
   */
  next?: string;
}
/**
 * Request of wechat.svc.replay.<sandbox>, and for the platform of wechat.svc.replay: inbound messages again.
 */
export interface ReplayQuery {
  /**
   * Required if the subject has none. It must not differ from the subject's.
   */
  sandbox?: string | null;
  /**
   * Position; messages after it. Empty: from the oldest one on.
   */
  after?: string;
  /**
   * Messages stored since this time, in milliseconds; only if `after` is empty.
   */
  since_ms?: number | null;
  /**
   * Page size.
   */
  limit?: number;
}
/**
 * Unbind a bot, or all bots of a sandbox. Subject: wechat.unbind.<sandbox>.
 */
export interface Unbind {
  /**
   * If it is there, it is the subject's.
   */
  sandbox?: string | null;
  bot?: string | null;
  /**
   * All bots of the sandbox.
   */
  all?: boolean;
  /**
   * Names it in its receipt. Default: the header Nats-Msg-Id, else its sequence.
   */
  id?: string | null;
}
/**
 * Request of wechat.svc.window.<sandbox>, and for the platform of wechat.svc.window.
 */
export interface WindowQuery {
  /**
   * Required if the subject has none. It must not differ from the subject's.
   */
  sandbox?: string | null;
  /**
   * Required only if the sandbox has several bots.
   */
  bot?: string | null;
  /**
   * Default: the bot's user.
   */
  user?: string | null;
}
