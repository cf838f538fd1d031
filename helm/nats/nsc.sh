#!/bin/sh
# Operator, accounts and users of all roles but sandboxes, once. README.md says how to go on.
set -eu
LC_ALL=C

nsc add operator --name wechat-nats --sys
nsc add account --name WECHAT --deny-pubsub '>'
nsc add account --name PLATFORM --deny-pubsub '>'
nsc add account --name SERVICE --deny-pubsub '>'
nsc add account --name AGENTS --deny-pubsub '>'
nsc add account --name SANDBOX --deny-pubsub '>'
nsc add account --name UNTRUSTED --deny-pubsub '>'
nsc edit account --name WECHAT --js-mem-storage=-1 --js-disk-storage=-1 --js-streams=-1 --js-consumer=-1
nsc add export --account WECHAT --name 'wechat.bind.*' --subject 'wechat.bind.*' --service --response-type Singleton
nsc add export --account WECHAT --name 'wechat.unbind.*' --subject 'wechat.unbind.*' --service --response-type Singleton
nsc add export --account WECHAT --name 'wechat.erase.*' --subject 'wechat.erase.*' --service --response-type Singleton
nsc add export --account WECHAT --name 'wechat.svc.bindings.*' --subject 'wechat.svc.bindings.*' --service --response-type Singleton
nsc add export --account WECHAT --name 'wechat.svc.login.*' --subject 'wechat.svc.login.*' --service --response-type Singleton
nsc add export --account WECHAT --name wechat.svc.window --subject wechat.svc.window --service --response-type Singleton
nsc add export --account WECHAT --name wechat.svc.receipt --subject wechat.svc.receipt --service --response-type Singleton
nsc add export --account WECHAT --name 'wechat.event.*.>' --subject 'wechat.event.*.>'
nsc add export --account WECHAT --name '_INBOX_platform.>' --subject '_INBOX_platform.>'
nsc add export --account WECHAT --name wechat.out --subject wechat.out --service --response-type Singleton
nsc add export --account WECHAT --name 'wechat.svc.media.put.*' --subject 'wechat.svc.media.put.*' --service --response-type Singleton
nsc add export --account WECHAT --name 'wechat.out.*' --subject 'wechat.out.*' --service --response-type Singleton
nsc add export --account WECHAT --name 'wechat.svc.media.get.*' --subject 'wechat.svc.media.get.*' --service --response-type Singleton
nsc add export --account WECHAT --name 'wechat.svc.next.*' --subject 'wechat.svc.next.*' --service --response-type Singleton
nsc add export --account WECHAT --name 'wechat.svc.receipt.*' --subject 'wechat.svc.receipt.*' --service --response-type Singleton
nsc add export --account WECHAT --name 'wechat.svc.replay.*' --subject 'wechat.svc.replay.*' --service --response-type Singleton
nsc add export --account WECHAT --name 'wechat.svc.window.*' --subject 'wechat.svc.window.*' --service --response-type Singleton
nsc add export --account WECHAT --name 'wechat.in.*' --subject 'wechat.in.*'
nsc add export --account WECHAT --name 'wechat.svc.send.*' --subject 'wechat.svc.send.*' --service --response-type Singleton
nsc add user --account WECHAT --name adapter --allow-pub 'wechat.inbox.*.*,wechat.in.*,wechat.out.*,wechat.bind.*,wechat.unbind.*,wechat.erase.*,wechat.event.*.>,wechat.adapter.>,wechat.out,wechat.dead.*,$KV.wechat_bindings.>,$KV.wechat_persons.>,$KV.wechat_readers.>,$KV.wechat_logins.>,$KV.wechat_leases.>,$O.wechat_media.>,$JS.API.INFO,$JS.API.STREAM.INFO.*,$JS.API.STREAM.MSG.GET.*,$JS.API.DIRECT.GET.>,$JS.API.CONSUMER.INFO.*.*,$JS.API.STREAM.CREATE.WECHAT_IN,$JS.API.STREAM.CREATE.WECHAT_OUT,$JS.API.STREAM.CREATE.WECHAT_EVENT,$JS.API.STREAM.CREATE.WECHAT_DEAD,$JS.API.STREAM.CREATE.OBJ_wechat_media,$JS.API.STREAM.CREATE.KV_wechat_bindings,$JS.API.STREAM.CREATE.KV_wechat_persons,$JS.API.STREAM.CREATE.KV_wechat_readers,$JS.API.STREAM.CREATE.KV_wechat_logins,$JS.API.STREAM.CREATE.KV_wechat_leases,$JS.API.STREAM.UPDATE.WECHAT_IN,$JS.API.STREAM.UPDATE.WECHAT_OUT,$JS.API.STREAM.UPDATE.WECHAT_EVENT,$JS.API.STREAM.UPDATE.WECHAT_DEAD,$JS.API.STREAM.UPDATE.OBJ_wechat_media,$JS.API.STREAM.UPDATE.KV_wechat_bindings,$JS.API.STREAM.UPDATE.KV_wechat_persons,$JS.API.STREAM.UPDATE.KV_wechat_readers,$JS.API.STREAM.UPDATE.KV_wechat_logins,$JS.API.STREAM.UPDATE.KV_wechat_leases,$JS.API.STREAM.MSG.DELETE.WECHAT_IN,$JS.API.STREAM.MSG.DELETE.WECHAT_OUT,$JS.API.STREAM.MSG.DELETE.WECHAT_EVENT,$JS.API.STREAM.MSG.DELETE.WECHAT_DEAD,$JS.API.STREAM.MSG.DELETE.OBJ_wechat_media,$JS.API.STREAM.PURGE.OBJ_wechat_media,$JS.API.STREAM.PURGE.WECHAT_EVENT,$JS.API.STREAM.PURGE.WECHAT_IN,$JS.API.CONSUMER.CREATE.WECHAT_OUT.*,$JS.API.CONSUMER.RESET.WECHAT_OUT.*,$JS.API.CONSUMER.MSG.NEXT.WECHAT_OUT.*,$JS.ACK.WECHAT_OUT.>,$JS.ACK.*.*.WECHAT_OUT.>,_INBOX_operator.>,_INBOX_platform.>,_R_.>,$SYS.REQ.USER.INFO,$SRV.PING.>,wechat.svc.bindings.list,_INBOX_adapter.>,$JS.API.STREAM.LIST' --allow-sub 'wechat.svc.>,wechat.kv.>,wechat.adapter.>,$SRV.>,_INBOX_adapter.>'
nsc generate creds --account WECHAT --name adapter --output-file adapter.creds
nsc add user --account WECHAT --name operator --allow-pub 'wechat.out.*,wechat.bind.*,wechat.unbind.*,wechat.erase.*,wechat.out,wechat.svc.>,$SRV.>,$JS.API.INFO,$JS.API.STREAM.NAMES,$JS.API.STREAM.LIST,$JS.API.STREAM.INFO.*,$JS.API.CONSUMER.NAMES.*,$JS.API.CONSUMER.LIST.*,$JS.API.CONSUMER.INFO.*.*,$JS.API.CONSUMER.CREATE.WECHAT_IN,$JS.API.CONSUMER.CREATE.WECHAT_IN.>,$JS.API.CONSUMER.CREATE.WECHAT_EVENT,$JS.API.CONSUMER.CREATE.WECHAT_EVENT.>,$JS.API.CONSUMER.CREATE.WECHAT_DEAD,$JS.API.CONSUMER.CREATE.WECHAT_DEAD.>,$JS.API.CONSUMER.CREATE.OBJ_wechat_media,$JS.API.CONSUMER.CREATE.OBJ_wechat_media.>,$JS.API.DIRECT.GET.WECHAT_IN,$JS.API.DIRECT.GET.WECHAT_IN.>,$JS.API.DIRECT.GET.WECHAT_EVENT,$JS.API.DIRECT.GET.WECHAT_EVENT.>,$JS.API.DIRECT.GET.WECHAT_DEAD,$JS.API.DIRECT.GET.WECHAT_DEAD.>,$JS.API.DIRECT.GET.OBJ_wechat_media,$JS.API.DIRECT.GET.OBJ_wechat_media.>,$JS.API.STREAM.MSG.GET.WECHAT_IN,$JS.API.STREAM.MSG.GET.WECHAT_EVENT,$JS.API.STREAM.MSG.GET.WECHAT_DEAD,$JS.API.STREAM.MSG.GET.OBJ_wechat_media,$JS.API.DIRECT.GET.WECHAT_OUT,$JS.API.DIRECT.GET.KV_wechat_bindings.$KV.wechat_bindings.layout,$JS.API.DIRECT.GET.KV_wechat_leases,$JS.API.STREAM.MSG.DELETE.WECHAT_DEAD,$JS.API.STREAM.MSG.DELETE.WECHAT_OUT,$JS.API.STREAM.PURGE.OBJ_wechat_media,$JS.FC.WECHAT_IN.>,$JS.FC.*.*.WECHAT_IN.>,$JS.FC.WECHAT_EVENT.>,$JS.FC.*.*.WECHAT_EVENT.>,$JS.FC.WECHAT_DEAD.>,$JS.FC.*.*.WECHAT_DEAD.>,$JS.FC.OBJ_wechat_media.>,$JS.FC.*.*.OBJ_wechat_media.>,$O.wechat_media.>,$SYS.REQ.USER.INFO' --allow-sub 'wechat.in.*,wechat.event.*.>,wechat.out,wechat.out.*,_INBOX_operator.>'
nsc generate creds --account WECHAT --name operator --output-file operator.creds
nsc add import --account PLATFORM --src-account WECHAT --name 'wechat.bind.*' --remote-subject 'wechat.bind.*' --local-subject 'wechat.bind.*' --service
nsc add import --account PLATFORM --src-account WECHAT --name 'wechat.unbind.*' --remote-subject 'wechat.unbind.*' --local-subject 'wechat.unbind.*' --service
nsc add import --account PLATFORM --src-account WECHAT --name 'wechat.erase.*' --remote-subject 'wechat.erase.*' --local-subject 'wechat.erase.*' --service
nsc add import --account PLATFORM --src-account WECHAT --name 'wechat.svc.bindings.*' --remote-subject 'wechat.svc.bindings.*' --local-subject 'wechat.svc.bindings.*' --service
nsc add import --account PLATFORM --src-account WECHAT --name 'wechat.svc.login.*' --remote-subject 'wechat.svc.login.*' --local-subject 'wechat.svc.login.*' --service
nsc add import --account PLATFORM --src-account WECHAT --name wechat.svc.window --remote-subject wechat.svc.window --local-subject wechat.svc.window --service
nsc add import --account PLATFORM --src-account WECHAT --name wechat.svc.receipt --remote-subject wechat.svc.receipt --local-subject wechat.svc.receipt --service
nsc add import --account PLATFORM --src-account WECHAT --name 'wechat.event.*.>' --remote-subject 'wechat.event.*.>' --local-subject 'wechat.event.*.>'
nsc add import --account PLATFORM --src-account WECHAT --name '_INBOX_platform.>' --remote-subject '_INBOX_platform.>' --local-subject '_INBOX_platform.>'
nsc add user --account PLATFORM --name platform --allow-pub 'wechat.bind.*,wechat.unbind.*,wechat.erase.*,wechat.svc.bindings.*,wechat.svc.login.*,wechat.svc.window,wechat.svc.receipt' --allow-sub 'wechat.event.*.>,_INBOX_platform.>'
nsc generate creds --account PLATFORM --name platform --output-file platform.creds
nsc add import --account SERVICE --src-account WECHAT --name wechat.out --remote-subject wechat.out --local-subject wechat.out --service
nsc add import --account SERVICE --src-account WECHAT --name wechat.svc.window --remote-subject wechat.svc.window --local-subject wechat.svc.window --service
nsc add import --account SERVICE --src-account WECHAT --name wechat.svc.receipt --remote-subject wechat.svc.receipt --local-subject wechat.svc.receipt --service
nsc add import --account SERVICE --src-account WECHAT --name 'wechat.svc.media.put.*' --remote-subject 'wechat.svc.media.put.*' --local-subject 'wechat.svc.media.put.*' --service
nsc add import --account SERVICE --src-account WECHAT --name 'wechat.event.*.receipt.>' --remote-subject 'wechat.event.*.receipt.>' --local-subject 'wechat.event.*.receipt.>'
nsc add user --account SERVICE --name service --allow-pub 'wechat.out,wechat.svc.window,wechat.svc.receipt,wechat.svc.media.put.*' --allow-sub 'wechat.event.*.receipt.>,_INBOX_service.>'
nsc generate creds --account SERVICE --name service --output-file service.creds
nsc add import --account AGENTS --src-account WECHAT --name 'wechat.out.*' --remote-subject 'wechat.out.*' --local-subject 'wechat.out.*' --service
nsc add import --account AGENTS --src-account WECHAT --name 'wechat.svc.media.get.*' --remote-subject 'wechat.svc.media.get.*' --local-subject 'wechat.svc.media.get.*' --service
nsc add import --account AGENTS --src-account WECHAT --name 'wechat.svc.media.put.*' --remote-subject 'wechat.svc.media.put.*' --local-subject 'wechat.svc.media.put.*' --service
nsc add import --account AGENTS --src-account WECHAT --name 'wechat.svc.next.*' --remote-subject 'wechat.svc.next.*' --local-subject 'wechat.svc.next.*' --service
nsc add import --account AGENTS --src-account WECHAT --name 'wechat.svc.receipt.*' --remote-subject 'wechat.svc.receipt.*' --local-subject 'wechat.svc.receipt.*' --service
nsc add import --account AGENTS --src-account WECHAT --name 'wechat.svc.replay.*' --remote-subject 'wechat.svc.replay.*' --local-subject 'wechat.svc.replay.*' --service
nsc add import --account AGENTS --src-account WECHAT --name 'wechat.svc.window.*' --remote-subject 'wechat.svc.window.*' --local-subject 'wechat.svc.window.*' --service
nsc add import --account AGENTS --src-account WECHAT --name wechat.svc.bindings.list --remote-subject wechat.svc.bindings.list --local-subject wechat.svc.bindings.list --service
nsc add import --account AGENTS --src-account WECHAT --name 'wechat.in.*' --remote-subject 'wechat.in.*' --local-subject 'wechat.in.*'
nsc add import --account AGENTS --src-account WECHAT --name 'wechat.event.*.>' --remote-subject 'wechat.event.*.>' --local-subject 'wechat.event.*.>'
nsc add user --account AGENTS --name agents --allow-pub 'wechat.out.*,wechat.svc.media.get.*,wechat.svc.media.put.*,wechat.svc.next.*,wechat.svc.receipt.*,wechat.svc.replay.*,wechat.svc.window.*,wechat.svc.bindings.list' --allow-sub 'wechat.in.*,wechat.event.*.>,_INBOX_agents.>'
nsc generate creds --account AGENTS --name agents --output-file agents.creds
nsc add import --account SANDBOX --src-account WECHAT --name 'wechat.out.*' --remote-subject 'wechat.out.*' --local-subject 'wechat.out.*' --service
nsc add import --account SANDBOX --src-account WECHAT --name 'wechat.svc.media.get.*' --remote-subject 'wechat.svc.media.get.*' --local-subject 'wechat.svc.media.get.*' --service
nsc add import --account SANDBOX --src-account WECHAT --name 'wechat.svc.media.put.*' --remote-subject 'wechat.svc.media.put.*' --local-subject 'wechat.svc.media.put.*' --service
nsc add import --account SANDBOX --src-account WECHAT --name 'wechat.svc.next.*' --remote-subject 'wechat.svc.next.*' --local-subject 'wechat.svc.next.*' --service
nsc add import --account SANDBOX --src-account WECHAT --name 'wechat.svc.receipt.*' --remote-subject 'wechat.svc.receipt.*' --local-subject 'wechat.svc.receipt.*' --service
nsc add import --account SANDBOX --src-account WECHAT --name 'wechat.svc.replay.*' --remote-subject 'wechat.svc.replay.*' --local-subject 'wechat.svc.replay.*' --service
nsc add import --account SANDBOX --src-account WECHAT --name 'wechat.svc.window.*' --remote-subject 'wechat.svc.window.*' --local-subject 'wechat.svc.window.*' --service
nsc add import --account SANDBOX --src-account WECHAT --name 'wechat.in.*' --remote-subject 'wechat.in.*' --local-subject 'wechat.in.*'
nsc add import --account SANDBOX --src-account WECHAT --name 'wechat.event.*.>' --remote-subject 'wechat.event.*.>' --local-subject 'wechat.event.*.>'
nsc edit signing-key --account SANDBOX --role sandbox --sk generate --allow-pub 'wechat.out.{{tag(sandbox)}},wechat.svc.media.get.{{tag(sandbox)}},wechat.svc.media.put.{{tag(sandbox)}},wechat.svc.next.{{tag(sandbox)}},wechat.svc.receipt.{{tag(sandbox)}},wechat.svc.replay.{{tag(sandbox)}},wechat.svc.window.{{tag(sandbox)}}' --allow-sub 'wechat.in.{{tag(sandbox)}},wechat.event.{{tag(sandbox)}}.>,_INBOX_{{tag(sandbox)}}.>' --payload=540672
nsc add import --account UNTRUSTED --src-account WECHAT --name 'wechat.svc.send.*' --remote-subject 'wechat.svc.send.*' --local-subject 'wechat.svc.send.*' --service
nsc add import --account UNTRUSTED --src-account WECHAT --name 'wechat.svc.media.get.*' --remote-subject 'wechat.svc.media.get.*' --local-subject 'wechat.svc.media.get.*' --service
nsc add import --account UNTRUSTED --src-account WECHAT --name 'wechat.svc.media.put.*' --remote-subject 'wechat.svc.media.put.*' --local-subject 'wechat.svc.media.put.*' --service
nsc add import --account UNTRUSTED --src-account WECHAT --name 'wechat.svc.next.*' --remote-subject 'wechat.svc.next.*' --local-subject 'wechat.svc.next.*' --service
nsc add import --account UNTRUSTED --src-account WECHAT --name 'wechat.svc.receipt.*' --remote-subject 'wechat.svc.receipt.*' --local-subject 'wechat.svc.receipt.*' --service
nsc add import --account UNTRUSTED --src-account WECHAT --name 'wechat.svc.replay.*' --remote-subject 'wechat.svc.replay.*' --local-subject 'wechat.svc.replay.*' --service
nsc add import --account UNTRUSTED --src-account WECHAT --name 'wechat.svc.window.*' --remote-subject 'wechat.svc.window.*' --local-subject 'wechat.svc.window.*' --service
nsc add import --account UNTRUSTED --src-account WECHAT --name 'wechat.in.*' --remote-subject 'wechat.in.*' --local-subject 'wechat.in.*'
nsc add import --account UNTRUSTED --src-account WECHAT --name 'wechat.event.*.>' --remote-subject 'wechat.event.*.>' --local-subject 'wechat.event.*.>'
nsc edit signing-key --account UNTRUSTED --role untrusted --sk generate --allow-pub 'wechat.svc.send.{{tag(sandbox)}},wechat.svc.media.get.{{tag(sandbox)}},wechat.svc.media.put.{{tag(sandbox)}},wechat.svc.next.{{tag(sandbox)}},wechat.svc.receipt.{{tag(sandbox)}},wechat.svc.replay.{{tag(sandbox)}},wechat.svc.window.{{tag(sandbox)}}' --allow-sub 'wechat.in.{{tag(sandbox)}},wechat.event.{{tag(sandbox)}}.>,_INBOX_{{tag(sandbox)}}.>' --payload=540672
nsc generate config --nats-resolver --sys-account SYS --config-file resolver.conf
