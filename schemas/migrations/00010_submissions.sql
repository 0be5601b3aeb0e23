-- Durable submissions: requests that a publisher leaves here, and fetches the results of.
--
-- A submission has one row in submissions, by which its id is known for long after it has
-- ended. As long as it waits or runs it has one in submission_queue, too, and it ends when
-- that row is deleted: so it ends once. A claim gives the row an owner and raises its run;
-- whoever ends or returns it names both, so one whose claim was taken away changes nothing.
-- What is wide, the request and the result, is in submission_texts.
--
-- What waits is never scanned. submission_turns has a row for each key that has something
-- waiting, and the key whose turn it is is the first in the order of due_at; whoever is
-- served, or refused, goes to the end. submission_lanes has a row for each model that such a
-- key waits for, since one that can't be had now must not hold up the others. Within a lane
-- the oldest is found by the index, from the lowest id on that may still wait there.
--
-- Who changes what waits holds the lock on the key's turn. Turns are locked in the order of
-- keys, or skipped if somebody has them. A release, in key_accounts, locks the turn of its
-- key after the account; nobody locks an account after a turn.

-- +goose Up

CREATE TABLE submissions (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    key_id     text COLLATE "C" NOT NULL,
    client_id  text COLLATE "C" NOT NULL, -- the publisher's own
    digest     bytea NOT NULL,            -- of the request
    created_at timestamptz NOT NULL,
    ended_at   timestamptz,
    outcome    text CHECK (outcome IN ('done', 'error')),
    request_id text COLLATE "C", -- of the run that ended it
    expires_at timestamptz,      -- when the result is forgotten
    CHECK ((ended_at IS NULL) = (outcome IS NULL)),
    UNIQUE (key_id, client_id)
);

CREATE INDEX submissions_ended ON submissions (ended_at) WHERE ended_at IS NOT NULL;

CREATE TABLE submission_texts (
    id                bigint PRIMARY KEY,
    request           text,
    completion        text,
    error             text, -- JSON
    prompt_tokens     integer,
    completion_tokens integer,
    expires_at        timestamptz
) WITH (autovacuum_vacuum_scale_factor = 0.05);

CREATE INDEX submission_texts_expired ON submission_texts (expires_at) WHERE expires_at IS NOT NULL;

CREATE TABLE submission_queue (
    id        bigint PRIMARY KEY,
    key_id    text COLLATE "C" NOT NULL,
    tenant_id text COLLATE "C" NOT NULL,
    model     text COLLATE "C" NOT NULL,
    deadline  timestamptz NOT NULL,
    owner_id  text COLLATE "C", -- null: it waits
    epoch     bigint NOT NULL DEFAULT 0,
    run       bigint NOT NULL DEFAULT 0,  -- counts claims
    lost      integer NOT NULL DEFAULT 0  -- counts runs that nobody ended
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 500, autovacuum_analyze_scale_factor = 0.05);

CREATE INDEX submission_queue_waiting ON submission_queue (key_id, model, id) WHERE owner_id IS NULL;
CREATE INDEX submission_queue_deadline ON submission_queue (deadline) WHERE owner_id IS NULL;
CREATE INDEX submission_queue_running ON submission_queue (key_id) WHERE owner_id IS NOT NULL;

CREATE TABLE submission_turns (
    key_id         text COLLATE "C" PRIMARY KEY,
    due_at         timestamptz NOT NULL,
    parked_until   timestamptz NOT NULL DEFAULT '-infinity', -- whatever the lanes say
    waits_for_slot boolean NOT NULL DEFAULT false,           -- a release ends the parking
    tries          integer NOT NULL DEFAULT 0                -- in vain, one after the other
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

CREATE INDEX submission_turns_due ON submission_turns (due_at);

CREATE TABLE submission_lanes (
    key_id    text COLLATE "C" NOT NULL,
    model     text COLLATE "C" NOT NULL,
    tenant_id text COLLATE "C" NOT NULL,
    head      bigint NOT NULL, -- no id below it waits in this lane
    due_at    timestamptz NOT NULL,
    tries     integer NOT NULL DEFAULT 0,
    reason    text NOT NULL DEFAULT '', -- the code of the last refusal
    busy      boolean NOT NULL DEFAULT false, -- a run of the model that ends opens it
    PRIMARY KEY (key_id, model)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

CREATE INDEX submission_lanes_due ON submission_lanes (key_id, due_at);
CREATE INDEX submission_lanes_busy ON submission_lanes (tenant_id, model, due_at) WHERE busy;

-- +goose StatementBegin
-- Locks the turn of a key, and makes the row if there is none. What is parked stays so.
CREATE FUNCTION submission_turn(moment timestamptz, key text) RETURNS submission_turns
LANGUAGE sql AS $$
    INSERT INTO submission_turns AS t (key_id, due_at) VALUES (key, moment)
    ON CONFLICT (key_id) DO UPDATE SET due_at = least(t.due_at, greatest(t.parked_until, moment))
    RETURNING t.*
$$;
-- +goose StatementEnd

-- +goose StatementBegin
-- Records a submission, or finds the one that has this id already; then nothing changes, and
-- same says whether it is the same request. state is that of the one that is recorded.
CREATE FUNCTION submission_submit(at timestamptz, key text, client text, tenant text, model_id text, body_digest bytea, body text, patience_ms bigint)
RETURNS TABLE (id bigint, created timestamptz, state text, duplicate boolean, same boolean)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off AS $$
#variable_conflict use_column
DECLARE
    moment timestamptz := coalesce(at, now());
    made   bigint;
    turn   submission_turns;
BEGIN
    IF NOT EXISTS (SELECT FROM submissions s WHERE s.key_id = key AND s.client_id = client) THEN
        INSERT INTO submissions AS s (key_id, client_id, digest, created_at) VALUES (key, client, body_digest, moment)
        ON CONFLICT (key_id, client_id) DO NOTHING RETURNING s.id INTO made;
    END IF;
    IF made IS NOT NULL THEN
        INSERT INTO submission_texts (id, request) VALUES (made, body);
        turn := submission_turn(moment, key);
        INSERT INTO submission_queue (id, key_id, tenant_id, model, deadline)
        VALUES (made, key, tenant, model_id, moment + patience_ms * interval '1 millisecond');
        INSERT INTO submission_lanes AS l (key_id, model, tenant_id, head, due_at) VALUES (key, model_id, tenant, made, moment)
        ON CONFLICT (key_id, model) DO UPDATE SET head = least(l.head, excluded.head);
        IF turn.due_at = moment THEN -- else somebody has been told already, or nothing can be done
            PERFORM pg_notify('ownllm_submissions', '');
        END IF;
        RETURN QUERY SELECT made, moment, 'waiting', false, true;
        RETURN;
    END IF;
    RETURN QUERY SELECT s.id, s.created_at,
        CASE WHEN s.outcome IS NOT NULL THEN s.outcome WHEN q.owner_id IS NULL THEN 'waiting' ELSE 'running' END,
        true, s.digest = body_digest
    FROM submissions s LEFT JOIN submission_queue q ON q.id = s.id WHERE s.key_id = key AND s.client_id = client;
END $$;
-- +goose StatementEnd

-- +goose StatementBegin
-- The oldest that waits in a lane, from an id on; null if none does. The comparison is that
-- of the index, so that no other is used, which would go through the rows of other keys.
CREATE FUNCTION submission_head(key text, model_id text, from_id bigint) RETURNS bigint
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    q record;
BEGIN
    SELECT x.id, x.key_id, x.model INTO q FROM submission_queue x
    WHERE x.owner_id IS NULL AND (x.key_id, x.model, x.id) >= (key, model_id, from_id)
    ORDER BY x.key_id, x.model, x.id LIMIT 1;
    IF q.key_id = key AND q.model = model_id THEN
        RETURN q.id;
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd

-- +goose StatementBegin
-- Claims what is to run next for an owner, as many as lim: from each key whose turn it is
-- one, then from each another, as far as the key has slots. Nothing if the owner has lost
-- its lease. Everything of a claim is read here: the statement that calls this function has
-- an older view, in which what was submitted just now isn't there.
CREATE FUNCTION submission_claim(at timestamptz, owner text, owner_epoch bigint, lim integer)
RETURNS TABLE (
    id bigint, key_id text, tenant_id text, client_id text, model text, request text, created_at timestamptz,
    owner_id text, run bigint, lost integer, tries integer
)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off AS $$
#variable_conflict use_column
DECLARE
    lanes_looked_at CONSTANT integer := 32;
    probe CONSTANT interval := '5 seconds'; -- after a refusal, one goes ahead, to see whether others can
    moment timestamptz := coalesce(at, now());
    keys   text[];
    room   integer[]; -- what each key may still get
    full_up boolean[]; -- all slots of the key are taken
    got    boolean[];
    taken  integer := 0;
    more   boolean := true;
    lane   record;
    next_due timestamptz;
BEGIN
    IF NOT EXISTS (SELECT FROM owners o WHERE o.id = owner AND o.epoch = owner_epoch AND o.held) THEN
        RETURN;
    END IF;
    keys := ARRAY(SELECT t.key_id FROM submission_turns t WHERE t.due_at <= moment ORDER BY t.due_at LIMIT lim FOR UPDATE SKIP LOCKED);
    IF cardinality(keys) = 0 THEN
        RETURN;
    END IF;
    -- Read after the turns are locked: a slot that comes free later finds its key parked.
    SELECT array_agg(x.n ORDER BY x.pos), array_agg(x.n <= 0 ORDER BY x.pos) INTO room, full_up FROM (
        SELECT a.pos, coalesce(k.concurrency, 1)::integer - greatest(coalesce(c.in_flight, 0),
            (SELECT count(*)::integer FROM submission_queue q WHERE q.key_id = a.key AND q.owner_id IS NOT NULL)) AS n
        FROM unnest(keys) WITH ORDINALITY AS a (key, pos)
        LEFT JOIN api_keys k ON k.id = a.key LEFT JOIN key_accounts c ON c.key_id = a.key) AS x;
    got := array_fill(false, ARRAY[cardinality(keys)]);
    WHILE more AND taken < lim LOOP
        more := false;
        FOR i IN 1 .. cardinality(keys) LOOP
            EXIT WHEN taken >= lim;
            CONTINUE WHEN room[i] <= 0;
            SELECT l.model, l.tries, submission_head(keys[i], l.model, l.head) AS id INTO lane
            FROM (SELECT x.model, x.head, x.tries FROM submission_lanes x WHERE x.key_id = keys[i] AND x.due_at <= moment ORDER BY x.due_at LIMIT lanes_looked_at) AS l
            ORDER BY 3 LIMIT 1;
            IF NOT FOUND OR lane.id IS NULL THEN
                room[i] := -1;
                CONTINUE;
            END IF;
            UPDATE submission_queue q SET owner_id = owner, epoch = owner_epoch, run = q.run + 1 WHERE q.id = lane.id
            RETURNING q.id, q.key_id, q.tenant_id, q.model, q.owner_id, q.run, q.lost INTO id, key_id, tenant_id, model, owner_id, run, lost;
            SELECT s.client_id, s.created_at, coalesce(t.request, '') INTO client_id, created_at, request
            FROM submissions s LEFT JOIN submission_texts t ON t.id = s.id WHERE s.id = lane.id;
            UPDATE submission_lanes l SET head = lane.id + 1, busy = false,
                due_at = moment + CASE WHEN lane.tries > 0 THEN probe ELSE '0' END WHERE l.key_id = keys[i] AND l.model = lane.model;
            tries := lane.tries;
            RETURN NEXT;
            room[i] := room[i] - 1; got[i] := true; more := true; taken := taken + 1;
        END LOOP;
    END LOOP;
    FOR i IN 1 .. cardinality(keys) LOOP
        -- Lanes in which nothing waits any more end.
        DELETE FROM submission_lanes l
        USING (SELECT x.model, x.head FROM submission_lanes x WHERE x.key_id = keys[i] AND x.due_at <= moment ORDER BY x.due_at LIMIT lanes_looked_at) AS d
        WHERE l.key_id = keys[i] AND l.model = d.model AND submission_head(keys[i], d.model, d.head) IS NULL;
        next_due := (SELECT l.due_at FROM submission_lanes l WHERE l.key_id = keys[i] ORDER BY l.due_at LIMIT 1);
        IF next_due IS NULL THEN
            DELETE FROM submission_turns t WHERE t.key_id = keys[i];
        ELSIF room[i] = 0 OR full_up[i] THEN
            -- Looked at again after 1 s, 2 s, 4 s, 8 s at the latest.
            UPDATE submission_turns t SET tries = CASE WHEN got[i] THEN 0 ELSE least(t.tries + 1, 3) END, waits_for_slot = true,
                parked_until = moment + x.pause, due_at = greatest(next_due, moment + x.pause)
            FROM (SELECT y.key_id, (1 << CASE WHEN got[i] THEN 0 ELSE y.tries END) * interval '1 second' AS pause FROM submission_turns y WHERE y.key_id = keys[i]) AS x
            WHERE t.key_id = x.key_id;
        ELSE
            UPDATE submission_turns t SET tries = 0, waits_for_slot = false, parked_until = '-infinity', due_at = greatest(next_due, moment)
            WHERE t.key_id = keys[i];
        END IF;
    END LOOP;
END $$;
-- +goose StatementEnd

-- +goose StatementBegin
-- Lets a submission that owner has claimed wait again, in its old place; false if it isn't
-- the owner's any more. what says for what: 'slot' and 'money' park the key until a release,
-- or for pause_ms; 'key' parks it for pause_ms; 'lane' parks its model alone; 'busy', too, or
-- until a run of the model ends; and 'none' nothing. lost_now counts the run as lost.
CREATE FUNCTION submission_return(at timestamptz, submission bigint, owner text, claim bigint, what text, code text, pause_ms bigint, lane_tries integer, lost_now boolean)
RETURNS boolean
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off AS $$
#variable_conflict use_column
DECLARE
    moment timestamptz := coalesce(at, now());
    later  timestamptz := moment + pause_ms * interval '1 millisecond';
    alone  boolean := what IN ('lane', 'busy');
    q      submission_queue;
    turn   submission_turns;
BEGIN
    SELECT * INTO q FROM submission_queue x WHERE x.id = submission AND x.owner_id = owner AND x.run = claim;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    turn := submission_turn(moment, q.key_id);
    UPDATE submission_queue x SET owner_id = NULL, lost = x.lost + lost_now::integer WHERE x.id = submission AND x.owner_id = owner AND x.run = claim;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO submission_lanes AS l (key_id, model, tenant_id, head, due_at, tries, reason, busy)
    VALUES (q.key_id, q.model, q.tenant_id, submission, CASE WHEN alone THEN later ELSE moment END, lane_tries, code, what = 'busy')
    ON CONFLICT (key_id, model) DO UPDATE SET head = least(l.head, submission), reason = code, tries = lane_tries, busy = what = 'busy',
        due_at = CASE WHEN alone THEN later ELSE least(l.due_at, moment) END;
    IF what = 'key' THEN
        UPDATE submission_turns t SET waits_for_slot = false, parked_until = later, due_at = later WHERE t.key_id = q.key_id;
    ELSIF what = 'money' OR what = 'slot' AND EXISTS ( -- a slot that came free before the turn was locked has told nobody
        SELECT FROM api_keys k LEFT JOIN key_accounts c ON c.key_id = k.id WHERE k.id = q.key_id AND coalesce(c.in_flight, 0) >= k.concurrency
    ) THEN
        UPDATE submission_turns t SET waits_for_slot = true, parked_until = later, due_at = later WHERE t.key_id = q.key_id;
    ELSIF turn.waits_for_slot THEN
        -- What was claimed for this one is free.
        UPDATE submission_turns t SET waits_for_slot = false, parked_until = '-infinity', due_at = moment WHERE t.key_id = q.key_id;
    END IF;
    RETURN true;
END $$;
-- +goose StatementEnd

-- +goose StatementBegin
-- Ends submissions: those that owner has claimed, by their runs, or, if owner is null, some
-- that wait, whose turns are locked. What has ended, or isn't the owner's any more, is left
-- as it is. There is one row for each that was ended.
CREATE FUNCTION submission_end(at timestamptz, owner text, ids bigint[], claims bigint[], result text, request text, reply text, errors text[], prompt integer, tokens integer, keep_ms bigint)
RETURNS SETOF bigint
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off AS $$
#variable_conflict use_column
DECLARE
    moment timestamptz := coalesce(at, now());
    q      submission_queue;
    turn   submission_turns;
BEGIN
    FOR i IN 1 .. cardinality(ids) LOOP
        SELECT * INTO q FROM submission_queue x WHERE x.id = ids[i];
        CONTINUE WHEN NOT FOUND;
        SELECT * INTO turn FROM submission_turns t WHERE t.key_id = q.key_id FOR UPDATE;
        DELETE FROM submission_queue x WHERE x.id = ids[i] AND x.run = claims[i] AND x.owner_id IS NOT DISTINCT FROM owner RETURNING x.* INTO q;
        CONTINUE WHEN NOT FOUND;
        UPDATE submissions s SET ended_at = moment, outcome = result, request_id = request, expires_at = moment + keep_ms * interval '1 millisecond' WHERE s.id = q.id;
        UPDATE submission_texts t SET request = NULL, completion = reply, error = errors[i], prompt_tokens = prompt, completion_tokens = tokens,
            expires_at = moment + keep_ms * interval '1 millisecond' WHERE t.id = q.id;
        IF owner IS NOT NULL THEN
            IF turn.waits_for_slot THEN
                UPDATE submission_turns t SET waits_for_slot = false, parked_until = '-infinity', due_at = moment WHERE t.key_id = q.key_id;
                PERFORM pg_notify('ownllm_submissions', '');
            END IF;
            PERFORM submission_open(moment, q.tenant_id, q.model);
        END IF;
        RETURN NEXT q.id;
    END LOOP;
END $$;
-- +goose StatementEnd

-- +goose StatementBegin
-- What a key waits for in a lane can be had again: the rest of it needn't wait any more.
CREATE FUNCTION submission_begun(at timestamptz, key text, model_id text) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off AS $$
#variable_conflict use_column
DECLARE
    moment timestamptz := coalesce(at, now());
BEGIN
    PERFORM FROM submission_turns t WHERE t.key_id = key FOR UPDATE;
    UPDATE submission_lanes l SET tries = 0, due_at = moment WHERE l.key_id = key AND l.model = model_id;
    UPDATE submission_turns t SET due_at = greatest(t.parked_until, moment) WHERE t.key_id = key AND t.due_at > moment;
    PERFORM pg_notify('ownllm_submissions', '');
END $$;
-- +goose StatementEnd

-- +goose StatementBegin
-- Makes due whoever has waited longest because a model was busy. It waits for nobody.
CREATE FUNCTION submission_open(moment timestamptz, tenant text, model_id text) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off AS $$
#variable_conflict use_column
DECLARE
    turn submission_turns;
    key  text;
BEGIN
    SELECT l.key_id INTO key FROM submission_lanes l
    WHERE l.busy AND l.tenant_id = tenant AND l.model = model_id ORDER BY l.due_at LIMIT 1;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    SELECT * INTO turn FROM submission_turns t WHERE t.key_id = key FOR UPDATE SKIP LOCKED;
    IF FOUND THEN
        UPDATE submission_lanes l SET busy = false, due_at = moment WHERE l.key_id = key AND l.model = model_id AND l.busy;
        UPDATE submission_turns t SET due_at = greatest(t.parked_until, moment) WHERE t.key_id = key AND t.due_at > moment;
        PERFORM pg_notify('ownllm_submissions', '');
    END IF;
END $$;
-- +goose StatementEnd

-- +goose StatementBegin
-- A key that waits for a slot gets its turn when one comes free. The row is locked before it
-- is looked at: whoever parks the key at this moment has it.
CREATE FUNCTION submission_release() RETURNS trigger
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off AS $$
#variable_conflict use_column
DECLARE
    turn submission_turns;
BEGIN
    SELECT * INTO turn FROM submission_turns t WHERE t.key_id = NEW.key_id FOR UPDATE;
    -- As many as it has claimed are its own anyway: the end of one of those gives it its turn.
    IF FOUND AND turn.waits_for_slot AND NEW.in_flight >= (SELECT count(*) FROM submission_queue q WHERE q.key_id = NEW.key_id AND q.owner_id IS NOT NULL) THEN
        UPDATE submission_turns t SET waits_for_slot = false, parked_until = '-infinity', due_at = now() WHERE t.key_id = NEW.key_id;
        PERFORM pg_notify('ownllm_submissions', '');
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd

CREATE TRIGGER submission_release AFTER UPDATE OF in_flight ON key_accounts
FOR EACH ROW WHEN (NEW.in_flight < OLD.in_flight) EXECUTE FUNCTION submission_release();

-- +goose Down
DROP TRIGGER submission_release ON key_accounts;
DROP FUNCTION submission_release;
DROP FUNCTION submission_end;
DROP FUNCTION submission_open;
DROP FUNCTION submission_begun;
DROP FUNCTION submission_return;
DROP FUNCTION submission_claim;
DROP FUNCTION submission_head;
DROP FUNCTION submission_submit;
DROP FUNCTION submission_turn;
DROP TABLE submission_lanes;
DROP TABLE submission_turns;
DROP TABLE submission_queue;
DROP TABLE submission_texts;
DROP TABLE submissions;
