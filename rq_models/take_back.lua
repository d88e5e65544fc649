-- Cancel the jobs that are still queued.
--
-- KEYS  the queue list of each job
-- ARGV  1 RQ's key prefix, 2 seconds to keep what is cancelled, then the id of each job
-- Returns for each job whether it was queued still.
--
-- RQ never clears rq:canceled, and callers may give up often: so these are not listed there, and expire.
local call, answers = redis.call, {}
for n, queue in ipairs(KEYS) do
  local id = ARGV[2 + n]
  local job = ARGV[1] .. ':job:' .. id
  answers[n] = call('LREM', queue, 1, id)
  if answers[n] == 0 then
    -- Handed over, see take.lua, to a worker that was cut off before its take.
    local handed = redis.pcall('LREM', ARGV[1] .. '-models:handed:' .. string.sub(queue, #ARGV[1] + 8), 1, id)
    answers[n] = type(handed) == 'number' and handed or 0
  end
  if answers[n] > 0 and call('EXISTS', job) == 1 then
    call('HSET', job, 'status', 'canceled')
    call('EXPIRE', job, ARGV[2])
  end
end
return answers
