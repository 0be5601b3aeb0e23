-- A turn of one key, as in migration 00012, that tells what it has decided before it writes.
--
-- A worker can begin while the books still write, which takes longer than to decide. So what is
-- read comes first, then the decision, and then all that is written. The decision is told by
-- a message of severity INFO, which PostgreSQL sends at once, whatever client_min_messages is.
-- It is made under the locks of the turn, and holds once that is committed.
--
-- The function of 00012 stays for edges of before.

-- +goose Up

-- +goose StatementBegin
-- Settles a request, unless settle_id is null, and then admits one, unless ask_id is null, both
-- of one key; see books_settle and books_admit. The two aren't the same request. settled is the
-- state of the first. ahead says that an admission is to be told: granted, reserved_amount, token_price,
-- charged_month in days since 1970, slots, slots_free, budget (- for none) and budget_free.
CREATE FUNCTION books_turn_one(
    at timestamptz, of_key text,
    settle_id text, settle_prompt bigint, completion bigint, how text,
    owner text, owner_epoch bigint, open_tokens bigint,
    ask_tenant text, ask_model text, ask_id text, prompt bigint, lim bigint, agent text, timeout bigint, ahead boolean,
    OUT settled text,
    OUT reason text, OUT granted bigint, OUT reserved_amount bigint, OUT token_price bigint, OUT charged_month date,
    OUT slots integer, OUT slots_free integer, OUT budget bigint, OUT budget_free bigint, OUT wait_ms bigint
)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET enable_material = off AS $$
#variable_conflict use_column
DECLARE
    moment     timestamptz := coalesce(at, now());
    this_month date := date_trunc('month', moment AT TIME ZONE 'UTC')::date;
    now_ns     bigint := (extract(epoch FROM moment) * 1000000)::bigint * 1000;
    one_second CONSTANT bigint := 1000000000;
    no_cap     CONSTANT bigint := 4000000000000000000;
    full_time bigint; flying integer; -- as they were before
    r reservations; tokens bigint; charge bigint := 0; gave bigint := 0; freed integer := 0; -- by the settlement
    joint boolean := false; -- the budget's row gets settlement and admission at once
    of_user text; running integer; used bigint; held bigint; free bigint; -- without the settlement's request
    allowed bigint; need bigint; least_need bigint; next_full bigint; was reservations; waits boolean;
    fresh boolean := false; -- it is admitted now
BEGIN
    -- The locks of books_lock in its order, and its help if rows are missing.
    IF ask_id IS NULL THEN
        SELECT a.in_flight INTO flying FROM key_accounts a WHERE a.key_id = of_key FOR NO KEY UPDATE;
    ELSE
        SELECT b.full_at, a.in_flight INTO full_time, flying FROM tenant_buckets b CROSS JOIN key_accounts a
        WHERE b.tenant_id = ask_tenant AND a.key_id = of_key FOR NO KEY UPDATE OF b, a;
    END IF;
    IF flying IS NULL THEN
        PERFORM books_lock(CASE WHEN ask_id IS NULL THEN '{}' ELSE ARRAY[ask_tenant] END, ARRAY[of_key]);
        SELECT b.full_at INTO full_time FROM tenant_buckets b WHERE b.tenant_id = ask_tenant;
        SELECT a.in_flight INTO flying FROM key_accounts a WHERE a.key_id = of_key;
        flying := coalesce(flying, 0);
    END IF;

    -- What the settlement gives back.
    IF settle_id IS NOT NULL THEN
        SELECT * INTO r FROM reservations x WHERE x.id = settle_id AND x.key_id = of_key;
        settled := coalesce(r.state, 'unknown');
        IF settled = 'open' THEN
            tokens := coalesce(settle_prompt, r.prompt_tokens);
            IF how <> 'void' THEN
                charge := least(r.amount, books_cost(tokens + completion, r.price));
            END IF;
            gave := r.amount; freed := r.in_flight::integer;
            joint := ask_id IS NOT NULL AND gave > 0 AND r.month = this_month;
        END IF;
    END IF;

    -- The decision. It is one statement, because each expression outside of one costs time of its own.
    IF ask_id IS NOT NULL THEN
        SELECT CASE
                WHEN asked_before THEN 'ended' -- or still open, see below
                WHEN no_key OR revoked_at IS NOT NULL OR tenant_id <> ask_tenant THEN 'key_invalid'
                WHEN expires_at <= moment THEN 'key_expired'
                WHEN tenant_state <> 'active' THEN 'tenant_disabled'
                WHEN user_state <> 'active' THEN 'user_deactivated'
                WHEN no_lease THEN 'lease_lapsed'
                WHEN k.need > 0 AND k.least_need > unspent THEN 'budget_exceeded'
                WHEN k.next_full > now_ns + one_second THEN 'tenant_qps_limit'
                WHEN k.running >= concurrency THEN 'no_slot'
                WHEN k.need > 0 AND k.need > unspent - k.held THEN 'money_held'
                ELSE ''
            END,
            k.user_id, k.running, k.used, k.held, unspent - k.held, k.open_end, k.need, k.least_need, k.next_full,
            concurrency, cap, price, 0::bigint, 0::bigint, this_month, 0::bigint
        INTO reason,
            of_user, running, used, held, free, allowed, need, least_need, next_full,
            slots, budget, token_price, granted, reserved_amount, charged_month, wait_ms
        FROM (
            SELECT f.*, coalesce(cap, no_cap) - f.used AS unspent, ((prompt + open_end) * price + 999) / 1000 AS need,
                ((prompt + CASE WHEN lim IS NULL THEN 1 ELSE open_end END) * price + 999) / 1000 AS least_need
            FROM (
                SELECT w.id IS NOT NULL AS asked_before, q.id IS NULL AS no_key, o.id IS NULL AS no_lease, q.tenant_id, q.user_id,
                    q.revoked_at, q.expires_at, t.state AS tenant_state, u.state AS user_state,
                    q.budget_cents * 1000000 AS cap, coalesce(q.concurrency, 0) AS concurrency, greatest(0, flying - freed) AS running,
                    coalesce(m.spent + CASE WHEN joint THEN charge ELSE 0 END, 0) AS used,
                    greatest(0, m.reserved - CASE WHEN joint THEN gave ELSE 0 END) AS held,
                    coalesce(lim, open_tokens) AS open_end, coalesce(own.price, common.price, 0) AS price,
                    -- A bucket that is full only long from now was drawn from by a clock that was wrong.
                    greatest(CASE WHEN full_time <= now_ns + 60 * one_second THEN full_time ELSE 0 END, now_ns) + one_second / coalesce(t.qps, 1) AS next_full
                FROM (SELECT) AS one
                LEFT JOIN reservations w ON w.id = ask_id
                LEFT JOIN api_keys q ON q.id = of_key
                LEFT JOIN users u ON u.id = q.user_id
                LEFT JOIN tenants t ON t.id = ask_tenant
                LEFT JOIN budgets m ON m.key_id = of_key AND m.month = this_month
                LEFT JOIN owners o ON o.id = owner AND o.epoch = owner_epoch AND o.held
                LEFT JOIN model_prices own ON own.tenant_id = ask_tenant AND own.model = ask_model
                LEFT JOIN model_prices common ON common.tenant_id = '' AND common.model = ask_model
            ) AS f OFFSET 0
        ) AS k;
        IF reason = 'money_held' AND lim IS NULL AND least_need <= free AND (running = 0 OR held = 0) THEN
            -- The last of the budget: nobody else will give any of it back.
            reason := ''; allowed := books_tokens(free, token_price) - prompt;
            need := ((prompt + allowed) * token_price + 999) / 1000;
        END IF;
        IF reason = '' THEN
            fresh := true; granted := allowed; reserved_amount := need;
            running := running + 1; held := held + need; free := free - need;
        ELSIF reason = 'budget_exceeded' THEN
            wait_ms := ceil(extract(epoch FROM ((this_month + interval '1 month') AT TIME ZONE 'UTC') - moment) * 1000);
        ELSIF reason = 'tenant_qps_limit' THEN
            wait_ms := (next_full - now_ns - one_second + 999999) / 1000000;
        ELSIF reason NOT IN ('no_slot', 'money_held') THEN
            token_price := 0;
            SELECT * INTO was FROM reservations x WHERE x.id = ask_id AND x.key_id = of_key AND x.state = 'open';
            IF FOUND THEN
                -- A second time: its first answer got lost.
                reason := ''; granted := was.limit_tokens; reserved_amount := was.amount; token_price := was.price; charged_month := was.month;
            END IF;
        END IF;
        slots_free := greatest(0, slots - running); budget_free := greatest(0, free);
        IF ahead AND reason = '' THEN
            RAISE INFO '%', concat_ws(' ', granted, reserved_amount, token_price, charged_month - date 'epoch', slots, slots_free, coalesce(budget::text, '-'), budget_free);
        END IF;
    END IF;

    -- All that is written.
    IF settled = 'open' THEN
        IF how <> 'void' THEN
            INSERT INTO ledger (request_id, tenant_id, user_id, key_id, model, agent_id, month, prompt_tokens, completion_tokens, cost, outcome, at)
            VALUES (r.id, r.tenant_id, r.user_id, r.key_id, r.model, r.agent_id, r.month, tokens, completion, charge, how, moment)
            ON CONFLICT DO NOTHING;
        END IF;
        UPDATE reservations x SET state = CASE how WHEN 'expired' THEN 'expired' ELSE 'settled' END, in_flight = false, ended_at = moment
        WHERE x.id = r.id;
    ELSIF settled = 'unknown' AND how = 'void' THEN
        INSERT INTO reservations (id, key_id, tenant_id, user_id, model, month, price, prompt_tokens, limit_tokens, amount,
            state, in_flight, owner_id, epoch, deadline, created_at, ended_at)
        VALUES (settle_id, of_key, '', '', '', 'epoch', 0, 0, 0, 0, 'settled', false, '', 0, moment, moment, moment)
        ON CONFLICT DO NOTHING;
    END IF;
    IF gave > 0 AND NOT joint THEN
        UPDATE budgets x SET reserved = greatest(0, x.reserved - gave), spent = x.spent + charge
        WHERE x.key_id = of_key AND x.month = r.month;
    END IF;
    IF fresh THEN
        UPDATE tenant_buckets x SET full_at = next_full WHERE x.tenant_id = ask_tenant;
        INSERT INTO reservations (id, key_id, tenant_id, user_id, model, month, price, prompt_tokens, limit_tokens, amount,
            owner_id, epoch, agent_id, deadline, created_at)
        VALUES (ask_id, of_key, ask_tenant, of_user, ask_model, this_month, token_price, prompt, allowed, need,
            owner, owner_epoch, nullif(agent, ''), moment + timeout * interval '1 millisecond', moment);
    END IF;
    IF joint OR fresh AND need > 0 THEN
        UPDATE budgets x SET reserved = held, spent = used WHERE x.key_id = of_key AND x.month = this_month;
        IF NOT FOUND AND fresh AND need > 0 THEN
            INSERT INTO budgets (key_id, month, reserved) VALUES (of_key, this_month, held);
        END IF;
    END IF;
    IF fresh AND freed > 0 AND flying > 0 THEN
        -- The slot goes from one to the other, unless somebody is to be told of its release.
        SELECT w.waits_for_slot INTO waits FROM submission_turns w WHERE w.key_id = of_key FOR UPDATE;
        IF waits THEN
            UPDATE key_accounts x SET in_flight = flying - 1 WHERE x.key_id = of_key;
            UPDATE key_accounts x SET in_flight = flying WHERE x.key_id = of_key;
        END IF;
    ELSIF fresh OR freed > 0 THEN
        UPDATE key_accounts x SET in_flight = coalesce(running, greatest(0, flying - freed)) WHERE x.key_id = of_key;
    END IF;
END $$;
-- +goose StatementEnd

-- +goose Down
DROP FUNCTION books_turn_one(timestamptz, text, text, bigint, bigint, text, text, bigint, bigint, text, text, text, bigint, bigint, text, bigint, boolean);
