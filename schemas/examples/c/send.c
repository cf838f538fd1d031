/* A service that tells a user something and waits until it is known what became of it: ./send SANDBOX TEXT

   Each receipt is a line. Exit code 0 only for `accepted`.
   cc send.c -o send $(pkg-config --cflags --libs libnats libcjson) */

#include "common.h"

int main(int argc, char **argv)
{
    const char *sandbox = argv[1], *text = argv[2];
    natsConnection *nc;
    natsSubscription *receipts = NULL;
    cJSON *command = cJSON_CreateObject();
    char subject[128], id[128];

    if (argc != 3) {
        fprintf(stderr, "usage: send SANDBOX TEXT\n");
        return 2;
    }
    nc = connected(inbox_prefix("_INBOX"));
    snprintf(subject, sizeof subject, "wechat.event.%s.receipt.>", sandbox);
    must(natsConnection_SubscribeSync(&receipts, nc, subject), subject);
    must(natsConnection_Flush(nc), "flush"); /* listen before you speak */

    snprintf(id, sizeof id, "%s.send.%llx", sandbox, (unsigned long long) nats_NowInNanoSeconds());
    cJSON_AddStringToObject(command, "id", id);
    cJSON_AddStringToObject(command, "sandbox", sandbox);
    cJSON_AddStringToObject(command, "text", text);
    store(nc, "wechat.out", command, NULL);

    for (;;) {
        natsMsg *msg = NULL;
        natsStatus status = natsSubscription_NextMsg(&msg, receipts, 60000);
        cJSON *receipt;

        if (status == NATS_TIMEOUT)
            continue;
        must(status, subject);
        receipt = cJSON_ParseWithLength(natsMsg_GetData(msg), natsMsg_GetDataLength(msg));
        if (strcmp(text_of(receipt, "command"), id) == 0) {
            const char *outcome = text_of(receipt, "outcome");
            const cJSON *message_id;

            printf("%s %s", outcome, text_of(receipt, "reason"));
            cJSON_ArrayForEach(message_id, cJSON_GetObjectItemCaseSensitive(receipt, "message_ids"))
                printf(" %s", cJSON_GetStringValue(message_id));
            puts("");
            fflush(stdout);
            if (strcmp(outcome, "parked") != 0) /* which is not final: it waits for the user */
                return strcmp(outcome, "accepted") == 0 ? 0 : 1;
        }
        cJSON_Delete(receipt);
        natsMsg_Destroy(msg);
    }
}
