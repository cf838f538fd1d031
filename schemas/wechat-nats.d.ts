/* Messages of the bus, generated from the JSON Schemas here by `make generate`; do not edit.
   Of: 61e5088b1228a1906dd587326f85fa0e5240fdc0461f6b2c2061c08b31430cfd */

/**
 * How a binding behaves.
 */
export interface Options {
  /**
   * Create the durable pull consumer <sandbox> on WECHAT_IN for this sandbox.
   */
  durable?: boolean;
  /**
   * Show that the bot types from each inbound message to the answer.
   */
  auto_typing?: boolean;
  /**
   * Download what the user sends; false: only say that it came.
   */
  media?: boolean;
}
/**
 * Let a bot serve a sandbox. Subject: wechat.ctl.bind. Idempotent by `id`.
 */
export interface Bind {
  /**
   * Name of a sandbox.
   */
  sandbox: string;
  /**
   * iLink's bot id, …@im.bot.
   */
  bot: string;
  /**
   * Secret of the bot.
   */
  bot_token: string;
  /**
   * Request id. Default: the header Nats-Msg-Id.
   */
  id?: string | null;
  /**
   * iLink API base of this bot. Default: the service's.
   */
  base_url?: string | null;
  user?: string | null;
  /**
   * Where to poll from; default: where it was, or the start. A secret: the bot's token stands in iLink's cursors.
   */
  cursor?: string | null;
  options?: Options;
  /**
   * What the person before wrote, and the sandbox has not read, is delivered all the same. Default: an unbind of the last person, and a bind of another one, move the durable consumer, and the beginning of a replay, past it.
   */
  keep_undelivered?: boolean;
  /**
   * Whether iLink is asked first if it takes the token; one that it refuses (-14) is not bound (`stale_token`). Default: where the bind takes the place of a bot or token that works. false: never, and ids are taken as they are.
   */
  check?: boolean | null;
}
/**
 * Something happened to a binding. Subject: wechat.event.<sandbox>.binding.
 */
export interface BindingEvent {
  sandbox: string;
  bot: string;
  /**
   * replaced: another bot of the same user took its place. refused: a bind was not carried out. stale: iLink said -14 and the short recovery runs. needs_login: it failed; scan a new QR code. recovered: iLink takes the token again, also after needs_login.
   */
  change: "bound" | "needs_login" | "recovered" | "refused" | "replaced" | "stale" | "unbound";
  user?: string;
  /**
   * refused: a word for why. unbound: moved, where the bot went to another sandbox. stale and needs_login: iLink's words, if any.
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
  /**
   * bound, unbound: replay begins after this sequence. Absent: nothing is replayed, since nobody is bound now.
   */
  replay_after?: number | null;
  at_ms?: number;
}
/**
 * A binding without its token: the answer of wechat.svc.bindings.get and .list, and of bind.
 */
export interface BindingInfo {
  sandbox: string;
  bot: string;
  user?: string;
  base_url?: string;
  state?: "active" | "needs_login";
  /**
   * Why it needs a login; empty otherwise.
   */
  reason?: string;
  /**
   * When it came into this state.
   */
  since_ms?: number;
  options?: Options;
}
/**
 * Answer of wechat.svc.bindings.list and .get, in the order of bot ids.
 */
export interface BindingsPage {
  bindings: BindingInfo[];
  /**
   * Ask again with `after` set to this; empty: that was all.
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
   * Continue after this bot: `next` of the page before.
   */
  after?: string;
  /**
   * Most bindings of a page.
   */
  limit?: number;
}
/**
 * Answer to bind and unbind, sent to the header Reply-To once the outcome is stored.
 */
export interface ControlAnswer {
  ok: boolean;
  id?: string;
  /**
   * What is bound now (bind) or was until now (unbind).
   */
  bindings?: BindingInfo[];
  /**
   * Bots of the same user that this bind replaced.
   */
  replaced?: string[];
  /**
   * The sandbox that the bot has served until now, if another.
   */
  moved_from?: string;
  /**
   * iLink has been asked, and has not refused the token.
   */
  checked?: boolean;
  /**
   * One sentence that says what to do.
   */
  error?: string;
}
/**
 * A file.
 */
export interface FileItem {
  kind: "file";
  /**
   * As the sender calls it.
   */
  name?: string;
  media?: Media | null;
  /**
   * Why the bytes are missing: too_large, timeout, unavailable (the CDN refused or failed), corrupt (they cannot be decrypted), reference (none, or one that may not be followed), off (the binding's option), store (the bus did not take them); empty where they are there.
   */
  reason?: string;
}
/**
 * Bytes in the object store `wechat_media`. A sandbox reads its own by wechat.svc.media.get.<sandbox>.
 */
export interface Media {
  /**
   * Its name: <sandbox>/…
   */
  object: string;
  /**
   * A file name: the sender's, else one made for its type.
   */
  name?: string;
  /**
   * Type, found by content.
   */
  mime?: string;
  /**
   * Bytes.
   */
  size?: number;
  /**
   * Lower-case hex.
   */
  sha256?: string;
  /**
   * Pixels, where known.
   */
  width?: number | null;
  /**
   * Pixels, where known.
   */
  height?: number | null;
  /**
   * Where known.
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
   * Why the bytes are missing: too_large, timeout, unavailable (the CDN refused or failed), corrupt (they cannot be decrypted), reference (none, or one that may not be followed), off (the binding's option), store (the bus did not take them); empty where they are there.
   */
  reason?: string;
}
/**
 * What the user quoted.
 */
export interface Quote {
  /**
   * iLink's id of the quoted message; empty if it gave none.
   */
  id?: string;
  /**
   * The quoted text or a summary, as far as it is known.
   */
  text?: string;
  /**
   * Whose words; empty: not known.
   */
  said_by?: "" | "bot" | "user";
  /**
   * What was quoted: text, image, voice, file, video; empty: not known.
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
   * Why: kind, malformed or too_large.
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
   * Why the bytes are missing: too_large, timeout, unavailable (the CDN refused or failed), corrupt (they cannot be decrypted), reference (none, or one that may not be followed), off (the binding's option), store (the bus did not take them); empty where they are there.
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
   * The same as WAV, where it could be converted.
   */
  wav?: Media | null;
  /**
   * Why the bytes are missing: too_large, timeout, unavailable (the CDN refused or failed), corrupt (they cannot be decrypted), reference (none, or one that may not be followed), off (the binding's option), store (the bus did not take them); empty where they are there.
   */
  reason?: string;
}
/**
 * What may still be sent to the user before they write again.
 */
export interface Window {
  /**
   * Sends left; 0 also when time is over or WeChat takes no more; null: sends are not counted. Each part of a long text, each media item and each caption is one.
   */
  remaining?: number | null;
  /**
   * How many of `remaining` are kept back for answers: no command with `optional` takes them.
   */
  reserved?: number;
  /**
   * When the window closes; null: no window is open.
   */
  closes_at_ms?: number | null;
}
/**
 * What a user said to the bot of one sandbox. Subject: wechat.in.<sandbox>.
 */
export interface Inbound {
  /**
   * Unique; also the Nats-Msg-Id.
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
 * Answer of wechat.svc.login.*: a QR login and its code, which is a secret until the login is over.
 */
export interface Login {
  /**
   * Its id, for login.status, .verify and .cancel.
   */
  login: string;
  sandbox: string;
  status: "already_bound" | "cancelled" | "confirmed" | "expired" | "failed" | "need_verify_code" | "scanned" | "wait";
  /**
   * Number of the QR code, from 1.
   */
  code?: number;
  /**
   * The text to encode as a QR code, or a `data:` URL of a picture of it; empty when over.
   */
  qrcode_url?: string;
  /**
   * The code drawn for a terminal, dark on light by ANSI colours; of a picture, a sentence.
   */
  qrcode_text?: string;
  /**
   * The code as PNG, base64, where asked for; empty for a picture in another format.
   */
  qrcode_png?: string;
  /**
   * When the whole login ends.
   */
  expires_at_ms?: number;
  bot?: string;
  user?: string;
  /**
   * confirmed: who was bound to the sandbox before, if that is another person than who scanned.
   */
  former_user?: string;
  /**
   * need_verify_code: wrong_code; in an answer also checking, while digits are not judged yet. expired: time, or codes (too many expired). failed: blocked (too many wrong digits), bus, url, or why the bind was refused.
   */
  reason?: string;
  /**
   * One sentence that says what to do.
   */
  detail?: string;
}
/**
 * A step of a QR login. Subject: wechat.event.<sandbox>.login. Never holds the code: it is a secret.
 */
export interface LoginEvent {
  login: string;
  sandbox: string;
  /**
   * wait: a code is (or a new code is now) to be scanned, see `code`. scanned: to be confirmed on the phone. need_verify_code: send the digits shown on the phone by login.verify. confirmed: the bot is bound. already_bound: this user is served by a bot of the sandbox already. expired, failed, cancelled: it is over.
   */
  status: "already_bound" | "cancelled" | "confirmed" | "expired" | "failed" | "need_verify_code" | "scanned" | "wait";
  /**
   * Number of the QR code, from 1; a higher one: ask login.status for it.
   */
  code?: number;
  bot?: string;
  user?: string;
  /**
   * confirmed: who was bound to the sandbox before, if that is another person than who scanned.
   */
  former_user?: string;
  /**
   * need_verify_code: wrong_code; in an answer also checking, while digits are not judged yet. expired: time, or codes (too many expired). failed: blocked (too many wrong digits), bus, url, or why the bind was refused.
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
   * Answer with the code as PNG, too.
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
   * Answer with the code as PNG, too.
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
 * Headers of the answer of wechat.svc.media.get.<sandbox>; the payload are the bytes of the piece.
 */
export interface MediaBytes {
  /**
   * Bytes of the whole object.
   */
  "Wechat-Size": number;
  /**
   * Of the whole object, lower-case hex.
   */
  "Wechat-Sha256": string;
  /**
   * Ask again with `after` set to this; absent: it was the last.
   */
  "Wechat-Next"?: number | null;
}
/**
 * Headers of wechat.svc.media.put.<sandbox>; the payload are the bytes of the piece, 16 KiB (but for the last)
 * to 512 KiB. The answer is a Media, whole after the last piece. A piece may be repeated.
 */
export interface MediaPiece {
  /**
   * Your id of the upload, new for each.
   */
  "Wechat-Upload": string;
  /**
   * Bytes before this piece; the first has 0.
   */
  "Wechat-Offset"?: number;
  /**
   * It is the last piece.
   */
  "Wechat-Last"?: boolean;
  /**
   * File name, percent-encoded; on the last piece.
   */
  "Wechat-Name"?: string;
  /**
   * Of the whole; on the last piece: checked if given.
   */
  "Wechat-Sha256"?: string;
}
/**
 * Request of wechat.svc.media.get.<sandbox>: the next piece of an object. The answer's payload are its bytes.
 */
export interface MediaQuery {
  /**
   * `media.object` of an item.
   */
  object: string;
  /**
   * 0, then the header Wechat-Next of the answer before.
   */
  after?: number;
}
/**
 * A file to send.
 */
export interface OutFile {
  kind: "file";
  /**
   * An object of this sandbox; only its `object` (and `name`) count.
   */
  media?: Media | null;
  /**
   * The bytes themselves, for small ones, instead of `media`.
   */
  data?: string | null;
  /**
   * File name that the user sees.
   */
  name?: string;
  /**
   * Text sent before it, as a message of its own.
   */
  caption?: string;
}
/**
 * A picture to send.
 */
export interface OutImage {
  kind: "image";
  /**
   * An object of this sandbox; only its `object` (and `name`) count.
   */
  media?: Media | null;
  /**
   * The bytes themselves, for small ones, instead of `media`.
   */
  data?: string | null;
  /**
   * File name that the user sees.
   */
  name?: string;
  /**
   * Text sent before it, as a message of its own.
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
   * An object of this sandbox; only its `object` (and `name`) count.
   */
  media?: Media | null;
  /**
   * The bytes themselves, for small ones, instead of `media`.
   */
  data?: string | null;
  /**
   * File name that the user sees.
   */
  name?: string;
  /**
   * Text sent before it, as a message of its own.
   */
  caption?: string;
}
/**
 * Audio to send. It arrives as a file: WeChat shows no voice bubble of a bot.
 */
export interface OutVoice {
  kind: "voice";
  /**
   * An object of this sandbox; only its `object` (and `name`) count.
   */
  media?: Media | null;
  /**
   * The bytes themselves, for small ones, instead of `media`.
   */
  data?: string | null;
  /**
   * File name that the user sees.
   */
  name?: string;
  /**
   * Text sent before it, as a message of its own.
   */
  caption?: string;
}
/**
 * A command: send this. Subject: wechat.out.<sandbox>, or wechat.out with `sandbox`. Least: {"text":"hi"}.
 */
export interface Outbound {
  /**
   * Idempotency key. Default: the header Nats-Msg-Id, else the stream sequence.
   */
  id?: string | null;
  /**
   * Needed on plain wechat.out; elsewhere it must equal the subject's.
   */
  sandbox?: string | null;
  /**
   * Needed only where the sandbox has several bots.
   */
  bot?: string | null;
  /**
   * Default: the bot's user. An answer names the `user` of the message that it answers: another person may be bound by then.
   */
  user?: string | null;
  /**
   * Short form of one text item.
   */
  text?: string | null;
  items?: (OutText | OutImage | OutVideo | OutFile | OutVoice)[] | null;
  /**
   * Id of the inbound message that this answers. One of another person than the command goes to has it refused (other_user).
   */
  reply_to?: string | null;
  /**
   * While nothing may be sent: wait for the user's next message, or refuse at once.
   */
  when_closed?: "park" | "refuse";
  expires_in_s?: number | null;
  /**
   * plain: Markdown is turned into plain text.
   */
  format?: "markdown" | "plain";
  /**
   * A progress report: refused at once where it would take one of the sends that are kept back for answers (`reserved`), or where none is left.
   */
  optional?: boolean;
  /**
   * Instead of text and items: show or hide that the bot types.
   */
  typing?: ("off" | "on") | null;
}
/**
 * What became of a command. Exactly one final receipt each; `parked` is not final.
 *
 * Subject: wechat.event.<sandbox>.receipt.<command>, where `<command>` is its id: letters, digits, `-` and `_` stay,
 * each other byte becomes =XX (upper-case hex).
 */
export interface Receipt {
  /**
   * The command's id.
   */
  command: string;
  /**
   * UNROUTED where the command named none.
   */
  sandbox: string;
  /**
   * The command's sequence in WECHAT_OUT, as its publisher was told: an id may come again.
   */
  sequence?: number;
  /**
   * accepted: iLink answered with a message id. accepted_unconfirmed: success without an id, often dropped, never resent. refused: will not be sent. uncertain: it left and no answer came, also after one repeat with the same id. dead_lettered: unreadable, or every attempt failed; see WECHAT_DEAD. parked (not final): waits for the user or the login.
   */
  outcome: "accepted" | "accepted_unconfirmed" | "dead_lettered" | "parked" | "refused" | "uncertain";
  /**
   * invalid, not_bound, ambiguous_bot, other_user, window_closed, quota, reserved, throttled, needs_login, too_long, expired, rejected, unreadable, too_large, unreachable, crashed, backlog, media, typing; empty when accepted.
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
   * As iLink answered.
   */
  ret?: number | null;
  /**
   * As iLink answered.
   */
  errcode?: number | null;
  /**
   * As iLink answered.
   */
  errmsg?: string;
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
   * When this receipt was made.
   */
  at_ms?: number;
}
/**
 * Request of wechat.svc.receipt.<sandbox>, and for the platform of wechat.svc.receipt: the last of a command.
 */
export interface ReceiptQuery {
  /**
   * Needed where the subject names none; one that differs from the subject's is refused.
   */
  sandbox?: string | null;
  /**
   * Idempotency key of a command.
   */
  command: string;
}
/**
 * One message of a replay.
 */
export interface Replayed {
  /**
   * Stream sequence: the header Nats-Sequence of the live message.
   */
  seq: number;
  /**
   * An inbound message, as it was.
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
   * Ask again with `after` set to this; 0: that was all.
   */
  next?: number;
}
/**
 * Request of wechat.svc.replay.<sandbox>, and for the platform of wechat.svc.replay: inbound messages again.
 */
export interface ReplayQuery {
  /**
   * Needed where the subject names none; one that differs from the subject's is refused.
   */
  sandbox?: string | null;
  /**
   * Stream sequence; messages after it.
   */
  after?: number;
  /**
   * Messages stored since then, in milliseconds; only where `after` is 0.
   */
  since_ms?: number | null;
  /**
   * Also what persons wrote who were bound before those of now; else it is passed over.
   */
  former?: boolean;
  /**
   * Most messages of a page.
   */
  limit?: number;
}
/**
 * Let a bot, or every bot of a sandbox, serve it no longer. Subject: wechat.ctl.unbind.
 */
export interface Unbind {
  /**
   * Name of a sandbox.
   */
  sandbox: string;
  bot?: string | null;
  id?: string | null;
  /**
   * What the person before wrote, and the sandbox has not read, is delivered all the same. Default: an unbind of the last person, and a bind of another one, move the durable consumer, and the beginning of a replay, past it.
   */
  keep_undelivered?: boolean;
}
/**
 * What may be sent to a user changed. Subject: wechat.event.<sandbox>.window.
 */
export interface WindowEvent {
  sandbox: string;
  bot: string;
  user: string;
  /**
   * opened: something can be sent again, since the user wrote, or since WeChat takes messages again. low: few sends are left, told once per window. closed: `remaining` is 0.
   */
  change: "closed" | "low" | "opened";
  /**
   * Why it closed: window_closed (time), quota, throttled.
   */
  reason?: string;
  window?: Window;
  at_ms?: number;
}
/**
 * Request of wechat.svc.window.<sandbox>, and for the platform of wechat.svc.window.
 */
export interface WindowQuery {
  /**
   * Needed where the subject names none; one that differs from the subject's is refused.
   */
  sandbox?: string | null;
  /**
   * Needed only where the sandbox has several bots.
   */
  bot?: string | null;
  /**
   * Default: the bot's user.
   */
  user?: string | null;
}
