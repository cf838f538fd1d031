/* A platform that gives a sandbox its WeChat user:

       ./onboard login SANDBOX       shows a QR code; digits that the phone shows are typed here
       ./onboard bind SANDBOX BOT    a bot that you have; its token is in the environment, as BOT_TOKEN

   Exit code 0 once the bot is bound.
   cc onboard.c -o onboard $(pkg-config --cflags --libs libnats libcjson) */

#include "common.h"

/* Asks any adapter; ends the program with the sentence that it answers instead. Frees the request. */
static cJSON *asked(natsConnection *nc, const char *subject, cJSON *request)
{
    char *text = cJSON_PrintUnformatted(request);
    natsMsg *msg = NULL;
    const char *error = NULL;
    cJSON *answer;

    must(natsConnection_RequestString(&msg, nc, subject, text, 20000), subject);
    if (natsMsgHeader_Get(msg, "Nats-Service-Error", &error) == NATS_OK) {
        fprintf(stderr, "%s\n", error);
        exit(1);
    }
    answer = cJSON_ParseWithLength(natsMsg_GetData(msg), natsMsg_GetDataLength(msg));
    natsMsg_Destroy(msg);
    free(text);
    cJSON_Delete(request);
    return answer;
}

static cJSON *with_login(const cJSON *now)
{
    cJSON *query = cJSON_CreateObject();

    cJSON_AddStringToObject(query, "login", text_of(now, "login"));
    return query;
}

static bool is_one_of(const char *word, const char *const *words)
{
    for (; *words != NULL; words++)
        if (strcmp(word, *words) == 0)
            return true;
    return false;
}

static bool login(natsConnection *nc, const char *sandbox)
{
    static const char *const good[] = {"confirmed", "already_bound", NULL};
    static const char *const bad[] = {"expired", "failed", "cancelled", "lost", NULL};
    natsSubscription *events = NULL;
    cJSON *start = cJSON_CreateObject(), *now;
    char subject[128], state[160], shown[160] = "";
    int code = 0;

    snprintf(subject, sizeof subject, "wechat.event.%s.login", sandbox);
    must(natsConnection_SubscribeSync(&events, nc, subject), subject);
    cJSON_AddStringToObject(start, "sandbox", sandbox);
    now = asked(nc, "wechat.svc.login.start", start);
    for (;;) {
        const char *status = text_of(now, "status"), *reason = text_of(now, "reason");
        const cJSON *number = cJSON_GetObjectItemCaseSensitive(now, "code");
        int newest = cJSON_IsNumber(number) ? number->valueint : 1;
        natsMsg *event = NULL;
        cJSON *query;

        if (*text_of(now, "qrcode_text") != '\0' && newest != code && strcmp(status, "wait") == 0) {
            code = newest; /* a code lives for a minute or two; a new one has a higher number */
            puts(text_of(now, "qrcode_text")); /* a secret: who scans it first gets the sandbox */
        }
        snprintf(state, sizeof state, "%s%s%s", status, *reason != '\0' ? " " : "", reason);
        if (strcmp(state, shown) != 0) {
            strcpy(shown, state);
            printf("%s: %s\n", state, text_of(now, "detail"));
        }
        fflush(stdout);
        if (is_one_of(status, good) || is_one_of(status, bad))
            return is_one_of(status, good);
        query = with_login(now);
        if (strcmp(status, "need_verify_code") == 0 && strcmp(reason, "checking") != 0) {
            char digits[32] = "";

            if (fgets(digits, sizeof digits, stdin) == NULL)
                return false;
            digits[strspn(digits, "0123456789")] = '\0';
            cJSON_AddStringToObject(query, "code", digits);
            cJSON_Delete(now);
            now = asked(nc, "wechat.svc.login.verify", query);
            continue;
        }
        if (natsSubscription_NextMsg(&event, events, 3000) == NATS_OK) /* an event may get lost; the status does not */
            natsMsg_Destroy(event);
        cJSON_Delete(now);
        now = asked(nc, "wechat.svc.login.status", query);
    }
}

static bool bind(natsConnection *nc, const char *sandbox, const char *bot)
{
    const char *token = getenv("BOT_TOKEN");
    natsSubscription *answers = NULL;
    natsMsg *msg = NULL;
    cJSON *command = cJSON_CreateObject(), *receipt;
    char id[64], inbox[128], subject[128];
    bool ok;

    snprintf(id, sizeof id, "bind.%llx", (unsigned long long) nats_NowInNanoSeconds());
    snprintf(inbox, sizeof inbox, "%s.%s", inbox_prefix("_INBOX"), id);
    must(natsConnection_SubscribeSync(&answers, nc, inbox), "inbox");
    cJSON_AddStringToObject(command, "id", id);
    cJSON_AddStringToObject(command, "bot", bot);
    cJSON_AddStringToObject(command, "bot_token", token != NULL ? token : "");
    snprintf(subject, sizeof subject, "wechat.bind.%s", sandbox);
    store(nc, subject, command, inbox);
    must(natsSubscription_NextMsg(&msg, answers, 60000), "receipt"); /* the bind is stored all the same */
    receipt = cJSON_ParseWithLength(natsMsg_GetData(msg), natsMsg_GetDataLength(msg));
    ok = strcmp(text_of(receipt, "outcome"), "applied") == 0;
    puts(ok ? "bound" : text_of(receipt, "detail"));
    return ok;
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "login") == 0)
        return login(connected(inbox_prefix("_INBOX")), argv[2]) ? 0 : 1;
    if (argc == 4 && strcmp(argv[1], "bind") == 0)
        return bind(connected(inbox_prefix("_INBOX")), argv[2], argv[3]) ? 0 : 1;
    fprintf(stderr, "usage: onboard login SANDBOX | onboard bind SANDBOX BOT\n");
    return 2;
}
