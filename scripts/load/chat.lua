-- The request for wrk, which README.md beside it says how to run.
local stream = os.getenv("STREAM") or "true"
local model = os.getenv("MODEL") or "demo"
local max_tokens = os.getenv("MAX_TOKENS") or "64"

wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer " .. (os.getenv("OPENAI_API_KEY") or "")
wrk.body = string.format(
  '{"model":"%s","stream":%s,"max_tokens":%s,"messages":[{"role":"user","content":"Count, please."}]}',
  model, stream, max_tokens)

-- wrk counts a reply as an error by its status alone. What it says here is how many replies
-- weren't 200, by status.
local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

function init()
  statuses = ""
  counts = {}
end

function response(status)
  if status ~= 200 then
    counts[status] = (counts[status] or 0) + 1
    statuses = ""
    for s, n in pairs(counts) do
      statuses = statuses .. " " .. s .. ":" .. n
    end
  end
end

function done()
  for i, thread in ipairs(threads) do
    local failed = thread:get("statuses")
    if failed ~= "" then
      io.write(string.format("thread %d, replies that weren't 200:%s\n", i, failed))
    end
  end
end
